"""What all ranks hold together is the layer, bit for bit, for the sizes of models known to fail."""

from collections.abc import Iterable, Iterator
from itertools import product

import pytest
import torch

from checkpoints import ALL_BUILDS, AWQ_BUILDS, BITSANDBYTES_BUILDS, FLOAT_BUILDS, Truth
from fusedq_kernels import reference
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.types import PackedWeight
from layers import MODULE, describe
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats import LayerFormat
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import Target, plan_layer
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, shard_module

TP_SIZES = (2, 4, 8)
N = 64

# in_features and group size of layers whose shares of K at TP 2, 4 or 8 cut groups.
MODELS = {
    "Qwen1.5-14B": (13696, 128),
    "Qwen2-72B": (29568, 128),
    "Llama-7B": (11008, 128),
    "Llama-13B": (13824, 128),
    "EXAONE-4": (27392, 128),
    "Qwen2.5-0.5B": (896, 128),
    "Qwen3-30B-A3B": (768, 128),
    "Qwen3-235B-A22B": (1536, 128),
    "DeepSeek-V2-Lite": (10944, 64),
    "Nemotron-3-Nano": (1856, 16),
    "Qwen3-VL": (4304, 32),
}
# A rank's rows are a multiple of 16 or refused; the others are served at every size.
REFUSED = {"DeepSeek-V2-Lite": (8,), "Nemotron-3-Nano": (8,), "Qwen3-VL": (2, 4, 8)}

TARGETS = {
    "cpu": Target(cpu_device(), torch.float16, keeps_activations=True),
    "gpu": Target(device_by_name("h200"), torch.float16, keeps_activations=True),
}


def scaled_down(k: int, group_size: int) -> int:
    """The smallest K of several groups whose eighths lie in groups as those of `k` do."""
    rest = k % (8 * group_size)
    return rest if rest > group_size else rest + 8 * group_size


def ranks(
    layer: LayerFormat, tensors: dict[str, torch.Tensor], style: ParallelStyle, tp: int, device: str
) -> Iterator[tuple[slice, slice, PackedWeight]]:
    """Every rank's rows and columns of the layer, and its resident weight."""
    for rank in range(tp):
        part = shard_module(MODULE, None, layer.n, layer.k, style, tp, rank)
        shard = LayerShard(MODULE, style, tp, (part,))
        plan = plan_layer(shard, {MODULE: layer}, TARGETS[device])
        loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
        for name, tensor in tensors.items():
            loader.add(name, tensor)
        loader.check_complete()
        region = part.region
        yield (
            slice(region.n_start, region.n_stop),
            slice(region.k_start, region.k_stop),
            loader.packed,
        )


def worth(packed: PackedWeight) -> torch.Tensor:
    """What a resident weight is worth per in_feature of its rank, fp64."""
    logical = unpack(packed)
    values = reference.dequantize(logical).double()
    if logical.perm is None:
        return values
    found = torch.zeros(len(values), logical.in_features, dtype=torch.float64)
    return found.index_add_(1, logical.perm.long(), values)


def exists(build: str, model: str) -> bool:
    """Whether a format has these sizes at all."""
    full_k, group_size = MODELS[model]
    k = scaled_down(full_k, group_size)
    if k % ALL_BUILDS[build].unit:
        return False
    if build in BITSANDBYTES_BUILDS and group_size < 32:
        return False
    if build in FLOAT_BUILDS and FLOAT_BUILDS[build].shape != "block":
        # Without groups one model stands for all
        return model == "Qwen2.5-0.5B"
    whole_blocks = k % group_size == 0 and k % 64 == 0 and group_size >= 32
    return build not in AWQ_BUILDS or whole_blocks


def cases(builds: Iterable[str]) -> list[tuple[str, str]]:
    """One of the models that come to the same sizes stands for all of them."""
    distinct = {(scaled_down(k, group), group): model for model, (k, group) in MODELS.items()}
    return [
        (build, model) for build in builds for model in distinct.values() if exists(build, model)
    ]


def refused(build: str, model: str) -> tuple[int, ...]:
    # Reordered rows are padded to whole steps, whatever the rank's share of them
    return () if ALL_BUILDS[build].ordered else REFUSED.get(model, ())


@pytest.mark.parametrize("model", MODELS)
def test_ranks_of_the_scaled_down_layer_cut_groups_where_those_of_the_model_do(model: str) -> None:
    full_k, group_size = MODELS[model]
    k = scaled_down(full_k, group_size)
    for tp in TP_SIZES:
        for rank in range(tp):
            assert rank * k // tp % group_size == rank * full_k // tp % group_size


@pytest.mark.parametrize(("build", "model"), cases(ALL_BUILDS))
def test_the_ranks_hold_the_layer(build: str, model: str) -> None:
    full_k, group_size = MODELS[model]
    k = scaled_down(full_k, group_size)
    truth = ALL_BUILDS[build].truth(N, k, group_size)
    whole = truth.values(0, N, 0, k)
    layer, tensors = describe(build, truth, group_size)
    # Slices of N do not depend on K: one model stands for all
    styles = [ParallelStyle.ROW, *[ParallelStyle.COLUMN] * (model == "Qwen2.5-0.5B")]
    for device, style, tp in product(TARGETS, styles, TP_SIZES):
        if style is ParallelStyle.ROW and tp in refused(build, model):
            with pytest.raises(PreflightError, match="in_features per rank; supported: multiples"):
                list(ranks(layer, tensors, style, tp, device))
            continue
        found = torch.full_like(whole, float("nan"))
        for rows, columns, packed in ranks(layer, tensors, style, tp, device):
            found[rows, columns] = worth(packed)
        assert torch.equal(found, whole), (device, style, tp)


MULTIPLIED = ("awq", "gptq-asym", "gptq-3bit-sym", "gptq-8bit-asym-order", "ct-int8-sym")
MULTIPLIED += ("bnb-nf4-nested",)


@pytest.mark.parametrize(("build", "model"), cases(MULTIPLIED))
def test_partial_products_add_up(build: str, model: str) -> None:
    full_k, group_size = MODELS[model]
    k = scaled_down(full_k, group_size)
    truth: Truth = ALL_BUILDS[build].truth(N, k, group_size)
    layer, tensors = describe(build, truth, group_size)
    x = torch.randn((3, k), generator=torch.Generator().manual_seed(0))
    whole = x.double() @ truth.values(0, N, 0, k).t()
    # Sums of K products in fp32, in any order
    bound = k * 2**-24 * (x.double().abs() @ truth.values(0, N, 0, k).abs().t())
    for tp in TP_SIZES:
        if tp in refused(build, model):
            continue
        total = torch.zeros((3, N))
        for _, columns, packed in ranks(layer, tensors, ParallelStyle.ROW, tp, "gpu"):
            own = x[:, columns]
            own = own if packed.perm is None else own[:, packed.perm.long()]
            total += own @ reference.dequantize(unpack(packed)).t()
        assert ((total - whole).abs() <= bound).all()
