"""The fused kernel as an experiment wants it: a tile of one's own, another decoder, another tail.

`select` does not choose here. What differs from the shipped kernel is a parameter of it: the tile,
the decoder, the counters that split-K counts in.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.cuda.integers import code_pairs, portable_integers
from fusedq_kernels.cuda.planes import columns_of_four, four_planes_by_asm, halves
from fusedq_kernels.cuda.ptx import integer_ptx
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, round_up, whole_splits
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    LogicalWeight,
    QuantSpec,
    TileConfig,
    WeightType,
)
from gemmbench.contender import Prepared, Unavailable, fused_dram_bytes
from gemmbench.own import device_spec
from gemmbench.weights import packed_bytes, packed_for_gpu
from vllm_fusedq.measure.undecoded_triton import decoding

_KERNEL = "triton-gemm"
_BF16_BITS = tl.constexpr(0x43004300)
_SHIFT, _MULTIPLY = "shr.u32 upper, $4, 8", "mul.hi.u32 upper, $4, 0x01000000"
_MULTIPLIED = tl.constexpr(
    integer_ptx(WeightType.UINT4B8.encoding, torch.bfloat16).replace(_SHIFT, _MULTIPLY)
)
assert _MULTIPLY in _MULTIPLIED.value


@triton.jit
def _uint4b8_portable(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - 8` as Triton compiles it, without assembly."""
    zero = tl.full((1,), 8, tl.int32)
    return portable_integers(words, zero, SUB, STEP, DTYPE, INTERPRET, 4)


@triton.jit
def _uint4b8_raw(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code + 128`, the magic number left in, in bf16."""
    tl.static_assert(DTYPE == tl.bfloat16)
    return halves(code_pairs(words, SUB, STEP, 4) | _BF16_BITS, DTYPE)


@triton.jit
def _uint4b8_multiplied(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - 8`; the planes' shift is the high half of a product, which the FMA pipe makes."""
    if INTERPRET:
        zero = tl.full((1,), 8, tl.int32)
        return portable_integers(words, zero, SUB, STEP, DTYPE, INTERPRET, 4)
    else:
        tl.static_assert(DTYPE == tl.bfloat16)
        first, second, third, fourth = four_planes_by_asm((words,), _MULTIPLIED)
        return halves(columns_of_four(first, second, third, fourth, SUB, STEP), DTYPE)


PORTABLE = {WeightType.UINT4B8: _uint4b8_portable}
MULTIPLIED = {WeightType.UINT4B8: _uint4b8_multiplied}
RAW_MAGIC = {WeightType.UINT4B8: _uint4b8_raw}

Decoders = tuple[tuple[WeightType, object], ...]


@dataclass(frozen=True)
class Variant:
    """The fused kernel at `tile`, or with `change` applied to the tile that `select` gives.

    `split_k` 0 takes the split of `select`. With `decodes` False the decoders give other values
    than the codes mean, and the answer is not checked.
    """

    name: str
    tile: TileConfig | None = None
    change: tuple[tuple[str, object], ...] = ()
    split_k: int = 0
    decoders: Decoders = ()
    decodes: bool = True

    def version(self) -> str:
        return f"triton {triton.__version__}"

    def tile_for(self, logical: LogicalWeight, m: int) -> TileConfig:
        """The tile of one launch. Raises ValueError where it does not suit the weight."""
        shape = GemmShape(m, *logical.codes.shape)
        return self.tile_at(shape, logical.spec, device_spec(logical.codes.device))

    def tile_at(self, shape: GemmShape, spec: QuantSpec, device: DeviceSpec) -> TileConfig:
        """The same for a weight that is not there."""
        n, k = shape.n, shape.k
        chosen = select(shape, spec, device).tile
        assert chosen is not None, "a GPU launch has a tile"
        tile = replace(self.tile or chosen, **dict(self.change))
        split = chosen.split_k if self.split_k == 0 else self.split_k
        tile = replace(tile, split_k=whole_splits(-(-k // BLOCK_K), split))
        if round_up(n, BLOCK_N) % tile.block_n:
            raise ValueError(f"{tile.block_n} wide tiles do not divide {n} out_features")
        return tile

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        weight_type = logical.spec.weight_type
        decoders = dict(self.decoders)
        if decoders and weight_type not in decoders:
            raise Unavailable(f"no variant for {weight_type.value}")
        packed = packed_for_gpu(logical, act_dtype)
        n, k = logical.codes.shape
        size = packed_bytes(packed)

        def run(x: torch.Tensor) -> torch.Tensor:
            tile = self.tile_for(logical, x.shape[0])
            call, out = Call.of(packed, _KERNEL, x.dtype), x.new_empty((x.shape[0], packed.n))
            with decoding(decoders):
                launch = KERNELS[_KERNEL].prepare(call, tile)
                launch(x, packed.qweight, packed.scales, packed.zeros, None, out)
            return out

        return Prepared(
            run,
            size,
            fused_dram_bytes(size, n, k),
            lambda m: describe(self.tile_for(logical, m)) if self.decodes else "wrong by design",
            checked=self.decodes,
        )


def describe(tile: TileConfig) -> str:
    """ "16x128 split 4 warps 4 stages 4", and what else is on."""
    options = ["scale_weights"] if tile.scale_weights else []
    shape = f"{tile.block_m}x{tile.block_n} split {tile.split_k}"
    return " ".join([shape, f"warps {tile.num_warps} stages {tile.num_stages}", *options])
