"""The plugin as vLLM sees it: registered once, harmless when it cannot run, cheap when unused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preloaded import run_script

pytestmark = pytest.mark.engine


def result(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("RESULT "))[7:]


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return result(done.stdout)


def in_vllm_process(code: str, folder: Path) -> str:
    script, log = folder / "code.py", folder / "code.log"
    script.write_text(code)
    assert run_script(script, [], dict(os.environ), log) == 0, log.read_text()[-4000:]
    return result(log.read_text())


def test_register_is_idempotent_and_imports_next_to_nothing() -> None:
    code = """
import json, sys
import vllm.model_executor.layers.quantization as q
import vllm.model_executor.layers.linear
before = set(sys.modules)
from vllm.plugins import load_general_plugins
load_general_plugins()
new = sorted(set(sys.modules) - before)
import vllm_fusedq
vllm_fusedq.register()
vllm_fusedq.register()
config = q.get_quantization_config("fusedq")
print("RESULT " + json.dumps([
    q.QUANTIZATION_METHODS.count("fusedq"), config.__name__, new,
]))
"""
    count, name, new = json.loads(in_new_process(code))
    assert (count, name) == (1, "FusedQConfig")
    assert not {module.split(".")[0] for module in new} & {"triton", "kernels", "fusedq_kernels"}
    # Every vLLM process pays for these, whatever it serves.
    assert [module for module in new if module.startswith("vllm_fusedq.")] == [
        "vllm_fusedq.errors",
        "vllm_fusedq.integration",
        "vllm_fusedq.integration.config",
        "vllm_fusedq.integration.register",
        "vllm_fusedq.integration.versions",
    ]


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0", "dev"])
def test_other_vllm_versions_get_one_line_and_no_registration(tmp_path: Path, version: str) -> None:
    code = f"""
import json, logging
import vllm, vllm_fusedq
import vllm.model_executor.layers.quantization as q
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.fusedq").addHandler(handler)
vllm.__version__ = {version!r}
vllm_fusedq.register()
print("RESULT " + json.dumps([lines, "fusedq" in q.QUANTIZATION_METHODS]))
"""
    lines, registered = json.loads(in_vllm_process(code, tmp_path))
    assert len(lines) == 1
    assert lines[0].startswith("vllm-fusedq is not active: vLLM")
    assert version in lines[0]
    assert not registered


def test_register_never_raises(tmp_path: Path) -> None:
    code = """
import sys, vllm_fusedq
sys.modules["vllm_fusedq.integration.versions"] = None
vllm_fusedq.register()
print("RESULT survived")
"""
    assert in_vllm_process(code, tmp_path) == "survived"


def test_override_answers_only_when_asked_and_takes_new_arguments(tmp_path: Path) -> None:
    code = """
import json
from vllm_fusedq.integration.config import FusedQConfig
ask = FusedQConfig.override_quantization_method
print("RESULT " + json.dumps([
    ask({"quant_method": "awq"}, None),
    ask({"quant_method": "awq"}, "awq", hf_config=None),
    ask({"quant_method": "awq"}, "fusedq", hf_config=None, anything=1),
]))
"""
    assert json.loads(in_vllm_process(code, tmp_path)) == [None, None, "fusedq"]


def test_attention_with_more_projections_is_refused(tmp_path: Path) -> None:
    code = """
from vllm_fusedq.integration.linear import FusedQLinearMethod
try:
    FusedQLinearMethod(None, "model.layers.0.self_attn.qkv_proj", (), {})._refuse_attention(5)
except RuntimeError as error:
    print("RESULT " + str(error).replace(chr(10), " "))
"""
    message = in_vllm_process(code, tmp_path)
    assert "model.layers.0.self_attn.qkv_proj: found an attention layer that fuses 5" in message
    assert "supported: query, key and value projections" in message


def test_amx_is_requested_in_every_vllm_process(tmp_path: Path) -> None:
    """Without the request, vLLM's CPU attention dies with SIGILL on some AMX machines."""
    code = """
import torch, vllm_fusedq
asked = []
torch.cpu._is_amx_tile_supported = lambda: True
torch.cpu._init_amx = lambda: asked.append(True)
vllm_fusedq.register()
print("RESULT", len(asked))
"""
    assert in_vllm_process(code, tmp_path) == "1"


def test_g_idx_survives_vllms_weight_mapper(tmp_path: Path) -> None:
    """vLLM's base class drops `.g_idx` from every quantized checkpoint before it is loaded."""
    code = """
import json
from vllm_fusedq.integration.config import FusedQConfig
mapper = FusedQConfig.get_checkpoint_weight_mapper()
names = ["model.layers.0.mlp.up_proj.g_idx", "model.layers.0.mlp.up_proj.qweight"]
print("RESULT " + json.dumps(mapper.apply_list(names)))
"""
    assert json.loads(in_vllm_process(code, tmp_path)) == [
        "model.layers.0.mlp.up_proj.g_idx",
        "model.layers.0.mlp.up_proj.qweight",
    ]
