"""A packing serves any reader of configs: another tool's file over GPTQ's and AWQ's tensors."""

import pickle
from pathlib import Path

import pytest

from checkpoints import ALL_BUILDS, write_checkpoint
from loading import TARGETS, assert_exact, load
from vllm_fusedq import formats
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.formats import CheckpointFormat, format_for
from vllm_fusedq.formats.awq_packing import GemmPacking
from vllm_fusedq.formats.gptq_packing import GptqPacking
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.plan.model import plan_model

UP = "model.layers.0.mlp.up_proj"


class OtherTool(CheckpointFormat):
    """A reader of a config of its own, as long as one has to be."""

    name = "other-tool"
    markers = frozenset({"qweight", "qzeros"})
    support = ()
    exclusion = "skipped_layers"

    def check_config(self) -> None:
        self.width = self.config["width"]

    def claims(self, module: str) -> bool:
        return self.block_of(module) in self.quantized_blocks

    def scheme(self, module: str) -> Scheme:
        stored = self.checkpoint.modules()[module]
        if self.config["like"] == "awq":
            return GemmPacking(bits=self.width).scheme(module, stored, 32)
        packing = GptqPacking(bits=self.width, zero_offset=1)
        return packing.scheme(stored, 32, symmetric=self.config["even"])


@pytest.mark.parametrize(
    ("build", "config"),
    [
        ("awq", {"like": "awq", "width": 4}),
        ("gptq-sym", {"like": "gptq", "width": 4, "even": True}),
        ("gptq-asym", {"like": "gptq", "width": 4, "even": False}),
    ],
)
def test_a_reader_of_another_tool_s_config_is_one_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, config: dict[str, object]
) -> None:
    monkeypatch.setitem(formats.FORMATS, OtherTool.name, OtherTool)
    config = {"quant_method": OtherTool.name, **config}
    truths = write_checkpoint(tmp_path, build, hidden=128, intermediate=256, config=config)
    checkpoint = read_checkpoint(tmp_path)
    layer = format_for(checkpoint).layer_of(UP)
    assert layer is not None
    assert layer.description.startswith("other-tool 4-bit g32, ")
    target = TARGETS["gpu"]
    plans = [
        plan
        for tp_size, rank in ((1, 0), (2, 1))
        for plan in plan_model(checkpoint, target, tp_size, ranks=[rank]).layers
    ]
    assert len(plans) == 8
    # Loading asks the layers, and no registry
    monkeypatch.delitem(formats.FORMATS, OtherTool.name)
    for plan in plans:
        assert_exact(load(plan, tmp_path), truths)


@pytest.mark.parametrize("build", ALL_BUILDS)
def test_a_described_layer_can_be_pickled(tmp_path: Path, build: str) -> None:
    write_checkpoint(tmp_path, build, hidden=128, intermediate=128)
    fmt = format_for(read_checkpoint(tmp_path))
    layer = fmt.layer_of(UP)
    assert layer is not None
    again = pickle.loads(pickle.dumps(layer))
    assert again == layer
    assert type(again.packing) is type(layer.packing)
    assert hash(again.packing) == hash(layer.packing)
