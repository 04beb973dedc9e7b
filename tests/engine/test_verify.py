"""`fusedq verify` on a real engine: every layer's kernel seen, none unpacked."""

import subprocess
import sys
from pathlib import Path

import pytest

from local_server import environment
from random_models import write_random_model
from test_experts import QWEN3
from tiny_models import asset

pytestmark = pytest.mark.engine

FUSEDQ = str(Path(sys.executable).with_name("fusedq"))


def test_every_layer_is_proven_from_the_trace() -> None:
    command = [FUSEDQ, "verify", str(asset("tiny-llama-awq-g128"))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if "fusedq_cpu::" in line]
    # A prefill and three decode steps
    assert {row[0]: row[3] for row in rows} == {
        f"model.layers.{layer}.{name}": "4"
        for layer in (0, 1)
        for name in (
            *("self_attn.qkv_proj", "self_attn.o_proj"),
            *("mlp.gate_up_proj", "mlp.down_proj"),
        )
    }
    assert "8 layers verified in the engine and with 1 to 4096 tokens, 0 failed" in done.stdout


def test_experts_are_proven_from_the_trace(tmp_path: Path) -> None:
    """Both stacks of a layer are seen in its one operator, and vLLM's router beside it."""
    write_random_model(tmp_path, QWEN3, "awq")
    command = [FUSEDQ, "verify", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [
        line for line in done.stdout.splitlines() if "experts.w" in line and "fusedq_cpu::" in line
    ]
    rows = [line.split() for line in lines]
    assert {row[0]: row[3] for row in rows} == {
        f"model.layers.{layer}.mlp.experts.{weight}": "4"
        for layer in (0, 1)
        for weight in ("w13", "w2")
    }
    assert "8 layers verified in the engine and with 1 to 4096 tokens, 0 failed" in done.stdout
