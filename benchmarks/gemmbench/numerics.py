"""Experiments whose answer is a number of bits, not of microseconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from fusedq_kernels import ops, reference
from fusedq_kernels.choose.heuristics import tiles_for
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import BLOCK_K, whole_splits
from fusedq_kernels.types import (
    Launch,
    LogicalWeight,
    PackedWeight,
    QuantSpec,
    TileConfig,
    WeightType,
)
from gemmbench.own import device_spec
from gemmbench.results import Row
from gemmbench.variants import RAW_MAGIC, Variant, describe
from gemmbench.weights import default_spec, packed_for_gpu
from vllm_fusedq.measure.random_weights import random_tokens, random_weight

_KERNEL = "triton-gemm"
_GROUP = 128
_SPLIT = 4
COLUMNS = ("run", "weight_type", "act_dtype", "n", "k", "m", "variant", "quantity", "value")


@dataclass(frozen=True)
class Numerics:
    """`rows(device, small)` yields what was found, in the columns of `COLUMNS`."""

    rows: Callable[[torch.device, bool], Iterator[Row]]


def _bit_equality(device: torch.device, small: bool) -> Iterator[Row]:
    """Outputs of each tile that differ from those of the tile for 16 tokens, the split fixed."""
    n, k, m = (256, 256, 16) if small else (4096, 4096, 256)
    weight_types = (WeightType.UINT4B8, WeightType.UINT8B128, WeightType.NF4)
    for weight_type in weight_types[:1] if small else weight_types:
        spec = default_spec(weight_type, _GROUP, k, torch.bfloat16)
        packed = packed_for_gpu(random_weight(n, k, spec, device), torch.bfloat16)
        x = random_tokens(m, k, torch.bfloat16, device)
        split = whole_splits(-(-k // BLOCK_K), _SPLIT)
        tiles = [
            replace(tile, split_k=split)
            for tile in tiles_for(device_spec(device), weight_type, BLOCK_K)
            if not tile.scale_weights
        ]
        first = next(tile for tile in tiles if tile.block_m == 16)
        expected = _run(x, packed, first)
        for tile in tiles:
            differing = (_run(x, packed, tile) != expected).sum().item()
            found = {"variant": describe(tile), "quantity": "outputs that differ"}
            yield _row(spec, torch.bfloat16, n, k, m) | found | {"value": differing}


def _accumulation(device: torch.device, small: bool) -> Iterator[Row]:
    """RMS of what is left where the exact answer is zero, over the RMS of half the sum."""
    n, k, m = (128, 512, 8) if small else (1024, 8192, 64)
    for act_dtype in (torch.bfloat16, torch.float16):
        spec = QuantSpec(WeightType.UINT4B8, _GROUP, act_dtype)
        logical, x, magnitude = cancelling_problem(n, k, m, spec, act_dtype, device)
        exact = TileConfig(64, 128, 1, 8, 4)
        scaled = TileConfig(64, 128, 1, 8, 4, scale_weights=True, x_descriptor=True)
        few = replace(exact, block_m=16, num_warps=4)
        variants = [
            Variant("scale on the partial product", exact, split_k=1),
            Variant("the same in 16 tokens", few, split_k=1),
            Variant("scale on the weights", scaled, split_k=1),
        ]
        if act_dtype == torch.bfloat16:
            raw = tuple(RAW_MAGIC.items())
            variants.append(Variant("magic number left in", exact, split_k=1, decoders=raw))
        for each in variants:
            y = each.prepare(logical, act_dtype).run(x)
            error = y.double().square().mean().sqrt().item() / magnitude
            found = {"variant": each.name, "quantity": "accumulation error"}
            yield _row(spec, act_dtype, n, k, m) | found | {"value": f"{error:.2e}"}


def cancelling_problem(
    n: int, k: int, m: int, spec: QuantSpec, act_dtype: torch.dtype, device: torch.device
) -> tuple[LogicalWeight, torch.Tensor, float]:
    """A weight and tokens whose exact product is zero, and the RMS of half of its sum.

    The second half of K repeats the groups of the first, each in another order, against negated
    tokens. y then holds the errors of accumulation alone, which its own rounding to 16 bits would
    hide otherwise. Scales are large so that those errors are normal numbers in fp16 too.
    """
    half = random_weight(n, k // 2, spec, device)
    tokens = random_tokens(m, k // 2, act_dtype, device)
    generator = torch.Generator("cpu").manual_seed(3)
    order = torch.cat(
        [
            start + torch.randperm(spec.group_size, generator=generator)
            for start in range(0, k // 2, spec.group_size)
        ]
    ).to(device)
    half = replace(half, scales=half.scales * 1024)
    magnitude = reference.matmul(tokens, half).square().mean().sqrt().item()
    logical = replace(
        half,
        codes=torch.cat([half.codes, half.codes[:, order]], 1),
        scales=torch.cat([half.scales, half.scales], 1),
    )
    return logical, torch.cat([tokens, -tokens[:, order]], 1), magnitude


def _run(x: torch.Tensor, packed: PackedWeight, tile: TileConfig) -> torch.Tensor:
    return ops.run(x, packed, None, Launch(_KERNEL, tile, "experiment"))


def _row(spec: QuantSpec, act_dtype: torch.dtype, n: int, k: int, m: int) -> Row:
    sizes = {"n": n, "k": k, "m": m}
    types = {"weight_type": spec.weight_type.value, "act_dtype": DType.of(act_dtype).value}
    return types | sizes


BIT_EQUALITY = Numerics(_bit_equality)
ACCUMULATION = Numerics(_accumulation)
