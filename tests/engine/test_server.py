"""The main job: `vllm serve --quantization fusedq` over HTTP on every committed checkpoint."""

import asyncio
import json
import math
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import jsonschema
import pytest
import torch
from openai import OpenAI

from engines import get, mean_error, prompt_logprobs
from local_server import Server, compile_arguments
from soaking.run import Load, soak
from soaking.verdict import AMX_TOLERANCE
from tiny_models import asset, reference
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.formats import format_for

pytestmark = pytest.mark.engine

Served = tuple[str, Server]
PLAN_SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "plan.v1.json"
SOAKED = "tiny-llama-gptq-g128"
FUSED_LAYERS = 8  # qkv_proj, o_proj, gate_up_proj and down_proj in each of two blocks


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)


def test_prompt_logprobs_match_the_producing_library(served: Served) -> None:
    name, server = served
    errors, ours, theirs, count = [], 0.0, 0.0, 0
    for prompt in reference(name)["prompts"]:
        found = prompt_logprobs(server, prompt["token_ids"])
        errors.append(mean_error(found, prompt["prompt_logprobs"]))
        ours -= sum(found[1:])
        theirs -= sum(prompt["prompt_logprobs"][1:])
        count += len(found) - 1
    assert max(errors) <= 0.03
    perplexity, expected = math.exp(ours / count), math.exp(theirs / count)
    assert perplexity == pytest.approx(expected, rel=0.01)


def test_completion_and_streaming_agree(served: Served) -> None:
    _, server = served
    request = {"model": "tiny", "prompt": "def __init__(self", "max_tokens": 24, "temperature": 0}
    whole = client(server).completions.create(**request).choices[0].text
    chunks = client(server).completions.create(**request, stream=True)
    assert whole
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


def test_chat(served: Served) -> None:
    _, server = served
    answer = client(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "import os"}], max_tokens=8
    )
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].message.content


def test_plan_names_a_kernel_for_every_quantized_layer(served: Served) -> None:
    _, server = served
    log = server.log
    assert log.count("fusedq kernel plan") == 1
    summary = re.search(
        r"fused: (\d+) \((.*)\); unquantized by the checkpoint: (\d+); "
        r"fallbacks: 0",
        log,
    )
    assert summary, log[-3000:]
    assert int(summary.group(1)) == FUSED_LAYERS
    assert re.fullmatch(r"8 x (cpu-fused|triton-gemm)", summary.group(2))


@pytest.mark.skipif(compile_arguments() != [], reason="torch.compile on a CPU needs g++")
def test_the_model_is_compiled(served: Served) -> None:
    """The answers of this file come from a compiled model, not from an eager one."""
    _, server = served
    mode = re.search(r"'mode': <CompilationMode\.(\w+)", server.log)
    assert mode
    assert mode.group(1) != "NONE"


def test_check_and_engine_say_the_same(served: Served) -> None:
    """Every row that `fusedq check` prints for a model is a row of the running engine's plan."""
    name, server = served
    device = "cpu"
    if torch.cuda.is_available():
        device = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [str(Path(sys.executable).with_name("fusedq")), "check", str(asset(name))]
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("model.")]
    logged = [line.split("] ", 1)[-1].split() for line in server.log.splitlines()]
    assert len(rows) == 4
    assert all(row in logged for row in rows)


def test_the_live_plan_over_http_and_in_the_report_file(served: Served) -> None:
    name, server = served
    (rank,) = get(server, "/fusedq/plan")["ranks"]
    jsonschema.validate(rank, json.loads(PLAN_SCHEMA.read_text()))
    assert json.loads(server.log_file.with_name("plan.json").read_text()) == rank
    assert rank["model"] == str(asset(name))
    assert sum(row["count"] for row in rank["layers"]) == rank["counts"]["fused"] == FUSED_LAYERS
    assert rank["counts"]["fallbacks"] == 0
    stored = read_checkpoint(asset(name))
    markers = format_for(stored).markers
    quantized = [each for each in stored.modules().values() if markers & each.keys()]
    packed = sum(t.nbytes for each in quantized for n, t in each.items() if n != "bias")
    assert rank["loading"]["bytes"] == packed
    resident = sum(size for row in rank["layers"] for size in row["bytes"].values())
    assert rank["repacking"]["bytes"] == resident
    assert rank["warm_up"]["launches"] > 0
    log = server.log
    assert log.count("fusedq loading: ") == 1
    assert f"{rank['warm_up']['launches']} launches" in log


def test_health_and_metrics_of_the_live_plan(served: Served) -> None:
    _, server = served
    assert get(server, "/fusedq/health") == {
        "status": "healthy",
        "ranks": [{"fused": FUSED_LAYERS, "unquantized": 1, "fallbacks": 0}],
    }
    (rank,) = get(server, "/fusedq/plan")["ranks"]
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if line)
    kernel = rank["layers"][0]["kernel"]
    assert float(metrics[f'fusedq_layers{{kernel="{kernel}"}}']) == FUSED_LAYERS
    size = sum(row["bytes"]["qweight"] for row in rank["layers"])
    assert float(metrics['fusedq_weight_bytes{kind="qweight"}']) == size
    assert float(metrics["fusedq_fallbacks_total"]) == 0


@pytest.mark.parametrize("served", [SOAKED], indirect=True)
def test_load_with_cancellations_loses_nothing_and_changes_no_answer(served: Served) -> None:
    """`benchmarks/soak.py` for seconds: each answer is that of the same request alone."""
    _, server = served
    tolerance = AMX_TOLERANCE if torch.cpu._is_amx_tile_supported() else 0.0
    load = Load(requests=120, concurrency=32, seconds=0, seed=0, tolerance=tolerance, pool=16)
    found = asyncio.run(soak(server, load))
    assert found["problems"] == []
    requests = found["requests"]
    assert requests["answered"] + requests["cancelled"] == requests["sent"] >= load.requests
    assert requests["cancelled"] >= load.requests // 6
