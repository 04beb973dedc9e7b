"""Memory while loading: what torch allocates beyond the resident weights, whatever is loaded."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench_load import MODULE, describe
from checkpoints import write_checkpoint
from fusedq_kernels.catalogue import Op
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.types import PackedWeight
from memory import peak_of
from random_layers import random_layers
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.formats import LayerFormat, Region
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard

DEVICES = {"cpu": cpu_device(), "gpu": device_by_name("h200")}
# A packed layer of 0.5 MB or more, in which tables and checks of constant size do not count
N, K, GROUP_SIZE = 1024, 1024, 128


def packed_bytes(packed: PackedWeight) -> int:
    tensors = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_the_tracer_sees_temporaries_inside_of_operators() -> None:
    codes = torch.ones(1000, dtype=torch.uint8)
    _, peak = peak_of(codes.sum)
    # The sum is over a copy in int64
    assert 8000 <= peak < 9000


WHOLE = LayerShard(MODULE, ParallelStyle.COLUMN, 1, (PartShard(MODULE, None, Region(0, N, 0, K)),))
LAST_COLUMNS = LayerShard(
    MODULE, ParallelStyle.ROW, 2, (PartShard(MODULE, None, Region(0, N, K // 2, K)),)
)
HEADS = {"q": (N // 2, N), "k": (N // 8, N // 4), "v": (N // 8, N // 4)}
QKV = LayerShard(
    MODULE,
    ParallelStyle.COLUMN,
    2,
    tuple(PartShard(MODULE, name, Region(*rows, 0, K)) for name, rows in HEADS.items()),
)
EMBEDDING = LayerShard(
    MODULE,
    ParallelStyle.COLUMN,
    1,
    (PartShard(MODULE, None, Region(0, N - 24, 0, K)),),
    padding=24,
    ops=(Op.EMBEDDING, Op.MATMUL),
)
SHARDS = {
    "whole": (WHOLE, "cpu"),
    "rank of K": (LAST_COLUMNS, "gpu"),
    "rank of q, k and v": (QKV, "cpu"),
    "embedding and lm_head": (EMBEDDING, "gpu"),
}


def load(plan: LayerPlan, layer: LayerFormat, tensors: dict[str, torch.Tensor]) -> LayerLoader:
    loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
    for part in plan.shard.parts:
        for stored in layer.tensors:
            loader.add(stored.name, tensors[stored.name], part.shard_id)
    loader.check_complete()
    return loader


@pytest.mark.parametrize("name", SHARDS)
def test_every_packing_needs_at_most_twice_the_packed_layer(name: str) -> None:
    shard, device = SHARDS[name]
    for made in random_layers(N, K, GROUP_SIZE):
        layer = describe(made)
        plan = plan_layer(shard, {MODULE: layer}, Target(DEVICES[device], torch.float16))
        loader, peak = peak_of(partial(load, plan, layer, made.tensors))
        packed = packed_bytes(loader.packed)
        assert packed < peak <= 3 * packed, (made.name, (peak - packed) / packed)


def test_a_model_needs_at_most_two_packed_layers_more(tmp_path: Path) -> None:
    """All resident weights are there from the start, and tensors come in vLLM's order."""
    write_checkpoint(tmp_path, "awq", layers=3, hidden=512, intermediate=1024, group_size=128)
    target = Target(DEVICES["gpu"], torch.float16)
    plans = plan_model(read_checkpoint(tmp_path), target, 2, ranks=[1]).layers

    def load_all() -> list[LayerLoader]:
        loaders = [LayerLoader.create(plan, torch.float16, torch.device("cpu")) for plan in plans]
        owners = {
            part.module: (loader, part) for loader in loaders for part in loader.plan.shard.parts
        }
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                module, _, suffix = name.rpartition(".")
                if module in owners:
                    loader, part = owners[module]
                    loader.add(suffix, file.get_tensor(name), part.shard_id)
        for loader in loaders:
            loader.check_complete()
        return loaders

    loaders, peak = peak_of(load_all, tmp_path)
    sizes = [packed_bytes(loader.packed) for loader in loaders]
    assert sum(sizes) < peak <= sum(sizes) + 2 * max(sizes)


@pytest.mark.parametrize("build", ["gptq-asym-order", "ct-asym"])
def test_conversion_holds_one_file_and_two_layers(tmp_path: Path, build: str) -> None:
    sizes = {"hidden": 512, "intermediate": 1024, "group_size": 128}
    write_checkpoint(tmp_path / "source", build, layers=4, **sizes)
    source, out = tmp_path / "source", tmp_path / "out"
    _, peak = peak_of(lambda: convert(source, out, max_file_bytes=2 << 20), source)
    files = [file.stat().st_size for file in out.glob("*.safetensors")]
    largest = max(info.nbytes for info in read_checkpoint(out).tensors.values())
    assert len(files) > 2
    assert max(files) < peak <= max(files) + 2 * largest
