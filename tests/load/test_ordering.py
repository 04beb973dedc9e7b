"""Activation reordering from the file to the resident weight: exact at every split, and counted."""

from pathlib import Path

import pytest
import torch

import fusedq_kernels
from checkpoints import ORDERED_BUILDS, Truth, replace, write_checkpoint
from fusedq_kernels import reference
from fusedq_kernels.catalogue import KERNELS, Op
from fusedq_kernels.layouts.packing import unpack, weight_bytes
from fusedq_kernels.testing import assert_close
from loading import DEVICES, load, plans_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.load.loader import LayerLoader


def assert_worth(loader: LayerLoader, truths: dict[str, Truth]) -> None:
    """The resident rows are worth exactly what the file says, each at the feature it reads."""
    logical = unpack(loader.packed)
    values = reference.dequantize(logical).double()
    # Padding is worth zero, so that the sum has one term that counts for each feature
    found = torch.zeros(len(values), logical.in_features, dtype=torch.float64)
    found.index_add_(1, logical.perm.long(), values)
    offset = 0
    for part in loader.plan.shard.parts:
        r = part.region
        expected = truths[part.module].values(r.n_start, r.n_stop, r.k_start, r.k_stop)
        assert torch.equal(found[offset : offset + r.n], expected)
        offset += r.n


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", ORDERED_BUILDS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_reordered_rows_are_worth_what_the_file_says(
    tmp_path: Path, build: str, tp_size: int, device: str, group_size: int
) -> None:
    sizes = {"hidden": 128, "intermediate": 192, "group_size": group_size}
    truths = write_checkpoint(tmp_path, build, **sizes)
    checkpoint = read_checkpoint(tmp_path)
    for rank in range(tp_size):
        for plan in plans_of(checkpoint, device, tp_size, rank):
            loader = load(plan, tmp_path)
            assert_worth(loader, truths)
            split = plan.k < plan.formats[0].k
            assert (plan.rows > plan.k) == split
            assert plan.spec.group_size in ((8, 16, 32) if split else (group_size,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_trivial_g_idx_under_desc_act_loads(tmp_path: Path, tp_size: int, device: str) -> None:
    sizes = {"hidden": 128, "intermediate": 192, "config": {"desc_act": True}}
    truths = write_checkpoint(tmp_path, "gptq-asym", **sizes)
    for rank in range(tp_size):
        for plan in plans_of(read_checkpoint(tmp_path), device, tp_size, rank):
            assert plan.ordered
            assert_worth(load(plan, tmp_path), truths)


def test_parts_of_one_layer_must_share_their_order(tmp_path: Path) -> None:
    edit = replace("model.layers.0.mlp.up_proj.g_idx", lambda t: t.flip(0))
    write_checkpoint(tmp_path, "gptq-sym-order", edits=[edit])
    plans = plans_of(read_checkpoint(tmp_path), "cpu")
    plan = next(plan for plan in plans if "gate_up" in plan.prefix)
    with pytest.raises(WeightLoadError) as error:
        load(plan, tmp_path)
    assert str(error.value).startswith(
        "model.layers.0.mlp.gate_up_proj: found another activation order in "
        "model.layers.0.mlp.up_proj than in model.layers.0.mlp.gate_proj, which vLLM fuses"
    )


@pytest.mark.parametrize("kernel", [name for name, each in KERNELS.items() if each.op is Op.MATMUL])
def test_ranks_of_a_reordered_layer_add_up(
    tmp_path: Path, kernel: str, request: pytest.FixtureRequest
) -> None:
    """Every kernel on the resident weights of two ranks, each with its half of the activation."""
    if kernel == "cpu-wna16":
        request.getfixturevalue("wna16_op")
    device = kernel if kernel == "cpu-wna16" else "gpu"
    truths = write_checkpoint(tmp_path, "gptq-asym-order", hidden=64, intermediate=256)
    x = torch.randn((3, 256), generator=torch.Generator().manual_seed(0)).half()
    found = torch.zeros((3, 64), dtype=torch.float64)
    for rank in range(2):
        plans = plans_of(read_checkpoint(tmp_path), device, 2, rank)
        plan = next(plan for plan in plans if "down_proj" in plan.prefix)
        own = x[:, rank * 128 : rank * 128 + 128]
        found += fusedq_kernels.matmul(own, load(plan, tmp_path).packed, None, kernel).double()
    expected = x.double() @ truths["model.layers.0.mlp.down_proj"].values(0, 64, 0, 256).t()
    assert_close(found, expected, max_error=12 * 2**-11, rms_error=1.5 * 2**-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_plan_counts_every_resident_byte_of_a_reordered_layer(
    tmp_path: Path, tp_size: int, device: str
) -> None:
    write_checkpoint(tmp_path, "gptq-asym-order", hidden=128, intermediate=192)
    for plan in plans_of(read_checkpoint(tmp_path), device, tp_size):
        sizes = weight_bytes(load(plan, tmp_path).packed)
        assert plan.weight_bytes == sizes.pop("qweight")
        assert plan.metadata_bytes == sum(sizes.values())
        assert sizes["perm"] == 4 * plan.rows
