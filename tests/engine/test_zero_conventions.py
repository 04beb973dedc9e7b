"""A GPTQ checkpoint that names the wrong zero point convention, in a worker: told, or refused."""

import json
from pathlib import Path

import pytest

from checkpoints import add, gptq_tensors, random_truth, write_checkpoint
from test_plugin import in_vllm_process

pytestmark = pytest.mark.engine

LOAD = """
import json, logging, sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
from loading import TARGETS, load, plans_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.integration.worker import WorkerState
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.settings import parse_settings
lines, answers = [], {{}}
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.fusedq").addHandler(handler)
for name in {names!r}:
    lines.clear()
    folder = Path({folder!r}) / name
    state = WorkerState(TARGETS["cpu"], parse_settings({{}}), None)
    state.plans.extend(plans_of(read_checkpoint(folder), "cpu"))
    try:
        for plan in state.plans:
            state.layer_loaded(load(plan, folder), False)
        answers[name] = [line for line in lines if "config says" in line]
    except WeightLoadError as error:
        answers[name] = str(error)
print("RESULT " + json.dumps(answers))
"""


def test_a_worker_tells_or_refuses_a_wrong_checkpoint_format(tmp_path: Path) -> None:
    v2 = {"config": {"checkpoint_format": "gptq_v2"}}
    write_checkpoint(tmp_path / "right", "gptq-sym")
    write_checkpoint(tmp_path / "wrong", "gptq-sym", **v2)
    # Too small to prove anything, so it would be read as the config says
    truth = random_truth(64, 96, 32, zero_range=(1, 15))
    edits = [
        add(f"model.layers.0.mlp.down_proj.{name}", tensor)
        for name, tensor in gptq_tensors(truth).items()
    ]
    v2["config"]["dynamic"] = {"+:.*down_proj": {"sym": False}}
    write_checkpoint(tmp_path / "mixed", "gptq-sym", edits=edits, **v2)
    support = Path(__file__).parents[1] / "support"
    code = LOAD.format(path=[str(support)], folder=str(tmp_path), names=["right", "wrong", "mixed"])
    answers = json.loads(in_vllm_process(code, tmp_path))
    assert answers["right"] == []
    assert answers["wrong"] == [
        "The config says gptq_v2, the values say gptq (sym is true and every stored zero point 7): "
        "7 layers are read as gptq."
    ]
    assert answers["mixed"].startswith("found layers that were stored in different ways: ")
    assert "nothing proven in 1 layers (model.layers.0.mlp.down_proj: too few" in answers["mixed"]
    assert "set it to gptq in the config" in answers["mixed"]
