"""Launches the fused dequantize-and-multiply kernel: `y = x @ dequantize(packed).T + bias`.

`gemm_kernel.py` is the kernel, `layouts/` owns the packed form, `choose/` chooses the `Launch`.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedq_kernels.choose import refusals
from fusedq_kernels.cuda.arrivals import MAX_TILES, arrival_counters
from fusedq_kernels.cuda.decode import DECODERS
from fusedq_kernels.cuda.gemm_kernel import fused_gemm_kernel
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import GroupGeometry, group_geometry
from fusedq_kernels.layouts.resident import TILED_WORDS, scale_words
from fusedq_kernels.types import (
    KernelName,
    Launch,
    PackedWeight,
    QuantSpec,
    TileConfig,
    layout_for,
)

# Pointers and strides are multiples of this, which Triton's launch specialisation finds out by
# itself; without it the loads of x are narrower than a 16-byte asynchronous copy.
ALIGNMENT = 16

ACT_DTYPES = tuple(dtype.torch for dtype in refusals.ACT_DTYPES)

_TL_DTYPES = {
    DType.FLOAT16: tl.float16,
    DType.BFLOAT16: tl.bfloat16,
    DType.FLOAT32: tl.float32,
}
# A finer step masks rows of x, which a descriptor cannot.
_MIN_DESCRIPTOR_STEP = 16
# Fixed here because Triton's default is about to change and would change the last bit of results.
FP_FUSION = True
# 16 MiB of 16-bit tokens of 4096 features. On an H200 8192 tokens took 8 % less time in groups of
# this many, and 2048 as long as without.
GROUP_TOKENS = 2048

INTERPRETED = not isinstance(fused_gemm_kernel, triton.runtime.JITFunction)


def kernel_constants(
    spec: QuantSpec,
    groups: GroupGeometry,
    tile: TileConfig,
    act_dtype: torch.dtype,
    has_bias: bool,
) -> dict[str, object]:
    """The constexpr arguments of `fused_gemm_kernel`; shared by the launcher and the audit."""
    return weight_constants(spec, groups) | {
        "SCALE_WEIGHTS": tile.scale_weights,
        "SCALE_STEPS": tile.scale_steps,
        "NARROW_SCALE": tile.scale_weights and spec.scale_dtype.torch == act_dtype,
        "X_DESCRIPTOR": tile.x_descriptor,
        "HAS_BIAS": has_bias,
        "SPLIT_K": tile.split_k,
        "SEGMENTS": tile.segments,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "NUM_STAGES": tile.num_stages,
    }


def weight_constants(spec: QuantSpec, groups: GroupGeometry) -> dict[str, object]:
    """The constexpr arguments of every kernel that reads a tiled weight."""
    words = scale_words(spec, groups)
    return {
        "DECODE": DECODERS[spec.weight_type],
        "SCALE_DTYPE": _TL_DTYPES[spec.scale_dtype],
        "VECTOR": words.vector,
        "PAIRED": words.rows == 2,
        "WORDS": TILED_WORDS[layout_for(KernelName.TRITON_GEMM, spec.weight_type)],
        "STEP": groups.step,
        "STEPS_PER_GROUP": spec.group_size // groups.step if groups.num_groups > 1 else 0,
        "INTERPRET": INTERPRETED,
    }


def launch_options(tile: TileConfig) -> dict[str, object]:
    """The options that a launch hands to the compiler; shared by the launcher and the audit."""
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }


def fused_gemm(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    launch: Launch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens by a packed weight: `y = x @ dequantize(packed).T + bias`.

    Args:
        x: `[M, K]` fp16 or bf16, unit column stride, any row stride.
        packed: a weight in its tiled layout (P4, P8, PL4) on the device of `x`.
        bias: `[N]` in the dtype of `x`, or None.
        launch: a `KernelName.TRITON_GEMM` launch, as chosen by `heuristics.select`.
        out: `[M, N]`, contiguous, dtype and device of `x`, to write into; None for a new tensor.

    Returns:
        y: `[M, N]`, contiguous, dtype of `x`; `out` where given. On a GPU the device of `x` must be
            the current one.

    Raises:
        ValueError: wrong dtype, shape, stride, layout or tile; the message says found and expected.
    """
    tile = _checked_tile(packed, launch)
    check_operands(x, packed, bias)
    m, n, k = x.shape[0], packed.n, packed.k
    y = torch.empty((m, n), dtype=x.dtype, device=x.device) if out is None else out
    if m == 0:
        return y
    stride_xm = x.stride(0) if m > 1 else k
    if x.data_ptr() % ALIGNMENT or stride_xm % ALIGNMENT:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
        stride_xm = k

    groups = group_geometry(k, packed.spec.group_size, packed.phase)
    num_blocks, n_padded, _ = packed.qweight.shape
    grid = launch_grid(m, n_padded, tile)
    partial = arrivals = None
    if tile.split_k > 1:
        _check_tiles(grid[0] * grid[1], tile)
        partial = torch.empty((tile.split_k, m, n), dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(x.device)
    tokens = x
    if tile.x_descriptor:
        block_shape = [tile.block_m, groups.step]
        tokens = TensorDescriptor(x, [m, k], [stride_xm, 1], block_shape)
    fused_gemm_kernel[grid](
        tokens,
        packed.qweight,
        packed.scales,
        bias,
        y,
        partial,
        arrivals,
        m,
        n,
        k,
        n_padded,
        groups.pad,
        groups.first_step,
        groups.last_group,
        num_blocks,
        triton.cdiv(num_blocks, tile.split_k * tile.segments),
        stride_xm,
        **kernel_constants(packed.spec, groups, tile, x.dtype, bias is not None),
        **launch_options(tile),
    )
    return y


def launch_grid(m: int, n_padded: int, tile: TileConfig) -> tuple[int, int, int]:
    """Programs along tokens, outputs, and splits of K or groups of token tiles.

    A GPU starts programs with the first axis fastest: an output tile's weight is read by all of its
    token tiles at once. Beyond GROUP_TOKENS tokens x no longer stays in L2 until the next output
    tile, so groups of token tiles, as equal as they come, walk over all outputs in turn.
    """
    tiles_m, tiles_n = triton.cdiv(m, tile.block_m), n_padded // tile.block_n
    if tile.split_k > 1:
        return tiles_m, tiles_n, tile.split_k
    groups = triton.cdiv(tiles_m, max(1, GROUP_TOKENS // tile.block_m))
    return triton.cdiv(tiles_m, groups), tiles_n, groups


def _checked_tile(packed: PackedWeight, launch: Launch) -> TileConfig:
    tile = launch.tile
    if launch.kernel is not KernelName.TRITON_GEMM or tile is None:
        raise ValueError(f"launch must be {KernelName.TRITON_GEMM.value} with a tile, got {launch}")
    layout = layout_for(launch.kernel, packed.spec.weight_type)
    if packed.layout is not layout:
        raise ValueError(f"fused_gemm reads layout {layout.value}, got {packed.layout.value}")
    n_padded = packed.qweight.shape[1]
    if n_padded % tile.block_n:
        raise ValueError(f"block_n {tile.block_n} does not divide the padded N {n_padded}")
    step = group_geometry(packed.k, packed.spec.group_size, packed.phase).step
    if tile.x_descriptor and step < _MIN_DESCRIPTOR_STEP:
        raise ValueError(f"x_descriptor needs groups of whole 16 rows, got steps of {step}")
    if min(tile.split_k, tile.segments) != 1:
        found = f"split_k {tile.split_k} and segments {tile.segments}"
        raise ValueError(f"split_k or segments must be 1 and none below, got {found}")
    return tile


def _check_tiles(num_tiles: int, tile: TileConfig) -> None:
    if num_tiles > MAX_TILES:
        raise ValueError(
            f"split_k {tile.split_k} of {num_tiles} output tiles; at most {MAX_TILES} can be split"
        )


def check_operands(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> None:
    """Raise ValueError, saying found and expected, where tokens or bias do not suit the weight."""
    if x.dtype not in ACT_DTYPES:
        raise ValueError(f"x must be float16 or bfloat16, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != packed.k:
        raise ValueError(f"x must have shape [M, {packed.k}], got {list(x.shape)}")
    if x.stride(1) != 1:
        raise ValueError(f"x must have unit column stride, got strides {x.stride()}")
    if x.device != packed.qweight.device:
        raise ValueError(f"x is on {x.device} but the weight on {packed.qweight.device}")
    if bias is None:
        return
    if bias.shape != (packed.n,) or bias.dtype != x.dtype or not bias.is_contiguous():
        raise ValueError(
            f"bias must be contiguous {x.dtype} of shape [{packed.n}], "
            f"got {bias.dtype} of shape {list(bias.shape)}"
        )
    if bias.device != x.device:
        raise ValueError(f"x is on {x.device} but the bias on {bias.device}")
