"""Stacks of all experts of a layer: taken apart as vLLM loads them, exact on every rank."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from vllm.model_executor.models.utils import WeightsMapper

from checkpoints import Tensors
from fusedq_kernels.choose.device import cpu_device
from mixtures import COUNT, INNER, NAMES, assert_holds, stacked, write_mixture
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.checkpoint.stacks import pieces_of
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.integration.stacks import StackMapper
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.experts import ExpertsLoader
from vllm_fusedq.load.provenance import StoredTensors
from vllm_fusedq.plan.experts import ExpertSplit
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import CUT, plan_model
from vllm_fusedq.prove.selfcheck import check_layer

STACK = "model.layers.0.mlp.experts"
TARGET = Target(cpu_device(), torch.float16, keeps_activations=True)
PARTS = {"gate_proj": (0, "w1"), "up_proj": (0, "w3"), "down_proj": (1, "w2")}
RENAMED = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})


def as_vllm_sees_it(checkpoint: Checkpoint) -> Tensors:
    """The file's tensors behind the mapper that vLLM puts together."""
    tensors = load_file(Path(checkpoint.path) / "model.safetensors")
    mapper = RENAMED
    mapper |= StackMapper.of(WeightsMapper(), pieces_of(checkpoint.tensors))
    mapper |= WeightsMapper(orig_to_new_suffix={".rotary_emb.inv_freq": None})
    return dict(mapper.apply(tensors.items()))


def load(
    path: Path, tp_size: int = 1, rank: int = 0, split: ExpertSplit = CUT
) -> list[ExpertsLoader]:
    checkpoint = read_checkpoint(path)
    plan = plan_model(checkpoint, TARGET, tp_size, ranks=[rank], split=split)
    source = StoredTensors(checkpoint, lambda name: path / name)
    loaders = [
        ExpertsLoader.create(each, torch.float16, torch.device("cpu"), source)
        for each in plan.layers
        if each.experts is not None
    ]
    before = f"language_model.{STACK}."
    for name, tensor in as_vllm_sees_it(checkpoint).items():
        if name.startswith(before):
            number, module, suffix = name.removeprefix(before).split(".", 2)
            side, part = PARTS[module]
            loaders[side].add(suffix, tensor, part, int(number))
    for loader in loaders:
        loader.check_complete()
    return loaders


BUILDS = ["ct-sym", "ct-asym", "ct-int8-asym", "ct-nvfp4", "fp8-block", "fp8-tensor"]
CASES = [*((build, ".") for build in BUILDS), ("ct-asym", "_"), ("fp8-block", "_")]


@pytest.mark.parametrize(("build", "after"), CASES)
def test_every_rank_holds_what_single_experts_would(tmp_path: Path, build: str, after: str) -> None:
    mixture = write_mixture(tmp_path, build, edits=[stacked(after=after)])
    assert_holds(load(tmp_path), mixture)
    for rank in range(2):
        half = (rank * INNER // 2, (rank + 1) * INNER // 2)
        assert_holds(load(tmp_path, 2, rank), mixture, half)
        spread = load(tmp_path, 2, rank, ExpertSplit(parallel=True))
        assert spread[0].plan.experts == (2 * rank, 2 * rank + 1)
        assert_holds(spread, mixture)


def test_stacks_that_compressed_tensors_packs_itself(tmp_path: Path) -> None:
    def packed_again(tensors: Tensors) -> None:
        for name, parts in {"gate_up_proj": NAMES[:2], "down_proj": NAMES[2:]}.items():
            experts = [
                [mixture.truths[f"{STACK}.{number}.{part}"].codes for part in parts]
                for number in range(COUNT)
            ]
            codes = torch.from_numpy(np.stack([np.concatenate(each) for each in experts]))
            packed = pack_to_int32(codes.to(torch.int8) - 8, 4)
            assert packed.shape == (COUNT, *codes.shape[1:-1], codes.shape[-1] // 8)
            tensors[f"{STACK}.{name}.weight_packed"] = packed

    mixture = write_mixture(tmp_path, "ct-sym")
    write_mixture(tmp_path, "ct-sym", edits=[stacked(), packed_again])
    assert_holds(load(tmp_path), mixture)


def test_a_bad_scale_names_its_expert(tmp_path: Path) -> None:
    def damaged(tensors: Tensors) -> None:
        tensors[f"{STACK}.gate_up_proj.weight_scale"][2, INNER, 0] = float("nan")

    write_mixture(tmp_path, "ct-sym", edits=[stacked(), damaged])
    with pytest.raises(
        WeightLoadError, match=f"{STACK}.2.up_proj.weight_scale: found 1 NaN or inf"
    ):
        load(tmp_path)


def test_what_reads_files_by_itself_reads_pieces(tmp_path: Path) -> None:
    """`fusedq selfcheck` and `fusedq convert`."""
    source, out = tmp_path / "source", tmp_path / "out"
    mixture = write_mixture(source, "ct-asym", edits=[stacked()])
    checkpoint = read_checkpoint(source)
    for plan in plan_model(checkpoint, TARGET).layers:
        assert check_layer(checkpoint, plan, TARGET, torch.device("cpu")).passed
    convert(source, out)
    assert_holds(load(out), mixture)
