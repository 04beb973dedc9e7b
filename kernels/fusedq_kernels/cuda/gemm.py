"""Launches the fused dequantize-and-multiply kernel: `y = x @ dequantize(packed).T + bias`.

`gemm_kernel.py` is the kernel, `layouts/` owns the packed form, `choose/` chooses the `Launch`.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedq_kernels import call as calls
from fusedq_kernels.call import Call
from fusedq_kernels.choose import waves
from fusedq_kernels.cuda.arrivals import MAX_TILES, arrival_counters
from fusedq_kernels.cuda.decode import DECODERS, QUARTERS, QUARTERS_STEP, UNLIFTED, form
from fusedq_kernels.cuda.floats import HEADROOM
from fusedq_kernels.cuda.gemm_kernel import fused_gemm_kernel
from fusedq_kernels.cuda.launcher import ALIGNMENT, INTERPRETED, Launcher
from fusedq_kernels.cuda.routed import UNROUTED, Routed
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, GroupGeometry, group_geometry, round_up
from fusedq_kernels.layouts.resident import TILED_WORDS, kept_dtype, scale_words
from fusedq_kernels.types import TILED_LAYOUTS, QuantSpec, TileConfig, WeightType

# What a launch without experts passes for their tables and numbers.
UNROUTED_ARGUMENTS = dict.fromkeys(("slots_ptr", "experts_ptr", "num_routed", "num_experts"))

ACT_DTYPES = tuple(dtype.torch for dtype in calls.ACT_DTYPES)

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_TL_DTYPES = {
    DType.FLOAT16: tl.float16,
    DType.BFLOAT16: tl.bfloat16,
    DType.FLOAT32: tl.float32,
}
# A finer step masks rows of x, which a descriptor cannot.
_MIN_DESCRIPTOR_STEP = 16
# Fewer tokens are multiplied by mma on a GPU with tcgen05, too.
_MIN_TCGEN05_TOKENS = 8 if _TRITON >= (3, 8) else 16
# Fixed here because Triton's default is about to change and would change the last bit of results.
FP_FUSION = True


def kernel_constants(
    spec: QuantSpec,
    groups: GroupGeometry,
    tile: TileConfig,
    act_dtype: torch.dtype,
    has_bias: bool,
    routed: Routed = UNROUTED,
) -> dict[str, object]:
    """The constexpr arguments of `fused_gemm_kernel`; shared by the launchers and the audit."""
    exactly = scales_exactly(spec, act_dtype)
    scale_weights = tile.scale_weights or (exactly and not tile.scale_steps)
    unlifted, quartered = form(UNLIFTED, spec.weight_type), form(QUARTERS, spec.weight_type)
    lifts = (
        unlifted is not None
        and exactly
        and scale_weights
        and spec.row_scaled
        and groups.num_groups > 1
    )
    quarters = (
        quartered is not None
        and act_dtype is torch.bfloat16
        and groups.step == QUARTERS_STEP
        and groups.num_groups > 1
        # For tcgen05 Triton 3.7 keeps registers in memory for it
        and not (scale_weights or tile.scale_steps)
    )
    constants = weight_constants(spec, groups)
    if quarters:
        constants["DECODE"] = quartered
    if lifts:
        constants["DECODE"] = unlifted
        constants["SCALE_DTYPE"] = _TL_DTYPES[DType.of(act_dtype)]
    return constants | {
        "HEADROOM": HEADROOM if lifts else 0,
        "QUARTERS": quarters,
        "SCALE_WEIGHTS": scale_weights,
        "SCALE_STEPS": tile.scale_steps,
        "OWN_ROW": tile.scale_steps and tile.block_m >= _MIN_TCGEN05_TOKENS,
        "NARROW_SCALE": scale_weights and is_narrow(spec.scale_dtype, act_dtype),
        "X_DESCRIPTOR": tile.x_descriptor,
        "HAS_BIAS": has_bias,
        "SPLIT_K": tile.split_k,
        "SEGMENTS": tile.segments,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "NUM_STAGES": tile.num_stages,
        **routed.constants(),
    }


def is_narrow(scale_dtype: DType, act_dtype: torch.dtype) -> bool:
    """Whether every scale of its dtype is a number of the dtype of activations."""
    if scale_dtype is DType.FLOAT8_E4M3FN:
        return True
    return kept_dtype(scale_dtype).torch == act_dtype


def scales_exactly(spec: QuantSpec, act_dtype: torch.dtype) -> bool:
    """Whether a weight times its group's scale is a number of the dtype of activations.

    E2M1 times E4M3 has six significant bits, times a power of two two of them: no partial product
    needs to be waited for.
    """
    narrow = spec.weight_type is WeightType.FLOAT4_E2M1F and spec.scale_dtype.itemsize == 1
    return narrow and is_narrow(spec.scale_dtype, act_dtype)


def weight_constants(spec: QuantSpec, groups: GroupGeometry) -> dict[str, object]:
    """The constexpr arguments of every kernel that reads a tiled weight."""
    words = scale_words(spec, groups)
    return {
        "DECODE": DECODERS[spec.weight_type],
        "SCALE_DTYPE": _TL_DTYPES[kept_dtype(spec.scale_dtype)],
        "VECTOR": words.vector,
        "PAIRED": words.rows == 2,
        "TAIL": words.tail,
        "WORDS": TILED_WORDS[TILED_LAYOUTS[spec.weight_type]],
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


def weight_arguments(call: Call, groups: GroupGeometry, tile: TileConfig) -> tuple[int, ...]:
    """The numbers, from N on, by which `fused_gemm_kernel` finds its way through a weight."""
    num_blocks = groups.k_padded // BLOCK_K
    return (
        *(call.n, call.k, round_up(call.n, BLOCK_N)),
        *(groups.pad, groups.first_step, groups.last_group),
        *(num_blocks, triton.cdiv(num_blocks, tile.split_k * tile.segments)),
    )


def prepare(call: Call, tile: TileConfig | None) -> Callable[..., None]:
    """`run(x, qweight, scales, zeros, bias, out)` for one layer and tile.

    See `catalogue.Kernel.prepare`. On a GPU the device of x must be the current one.

    Raises:
        ValueError: a tile that the weight cannot have; the message says found and expected.
    """
    groups = group_geometry(call.k, call.spec.group_size, call.phase)
    n, k, n_padded = call.n, call.k, round_up(call.n, BLOCK_N)
    tile = checked_tile(tile, n_padded, groups)
    split_k, of_layer = tile.split_k, weight_arguments(call, groups, tile)
    options = launch_options(tile)
    launchers = [
        Launcher(
            fused_gemm_kernel,
            kernel_constants(call.spec, groups, tile, call.dtype.torch, has_bias),
            options,
        )
        for has_bias in (False, True)
    ]

    def run(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        stride_xm = x.stride(0) if m > 1 else k
        if x.data_ptr() % ALIGNMENT or stride_xm % ALIGNMENT:
            x = x.contiguous() if not x.is_contiguous() else x.clone()
            stride_xm = k
        grid = launch_grid(m, n_padded, tile)
        partial = arrivals = None
        if split_k > 1:
            check_tiles(grid[0] * grid[1], tile)
            partial = torch.empty((split_k, m, n), dtype=torch.float32, device=x.device)
            arrivals = arrival_counters(x.device)
        tokens = described(x, stride_xm, tile, groups) if tile.x_descriptor else x
        places = qweight.data_ptr() | scales.data_ptr() | out.data_ptr()
        launchers[bias is not None].launch(
            *(grid, places, tokens, qweight, scales, bias, out, partial, arrivals, m),
            *(*of_layer, stride_xm, *UNROUTED_ARGUMENTS.values()),
        )

    return run


def described(
    x: torch.Tensor, stride_xm: int, tile: TileConfig, groups: GroupGeometry
) -> TensorDescriptor:
    """x for the tensor memory accelerator, in blocks of `[block_m, step]`."""
    return TensorDescriptor(x, [*x.shape], [stride_xm, 1], [tile.block_m, groups.step])


def launch_grid(m: int, n_padded: int, tile: TileConfig) -> tuple[int, int, int]:
    """Programs along tokens, outputs, and splits of K or groups of token tiles.

    A GPU starts programs with the first axis fastest: an output tile's weight is read by all of its
    token tiles at once. Groups of token tiles, as equal as they come, walk over all outputs in
    turn.
    """
    tiles_m, tiles_n = triton.cdiv(m, tile.block_m), n_padded // tile.block_n
    if tile.split_k > 1:
        return tiles_m, tiles_n, tile.split_k
    groups = triton.cdiv(tiles_m, waves.group_tiles(tile.block_m))
    return triton.cdiv(tiles_m, groups), tiles_n, groups


def checked_tile(tile: TileConfig | None, n_padded: int, groups: GroupGeometry) -> TileConfig:
    """The tile; ValueError, saying found and expected, where the weight cannot have it."""
    if tile is None:
        raise ValueError("triton-gemm needs a tile, got none")
    if n_padded % tile.block_n:
        raise ValueError(f"block_n {tile.block_n} does not divide the padded N {n_padded}")
    if tile.x_descriptor and groups.step < _MIN_DESCRIPTOR_STEP:
        raise ValueError(f"x_descriptor needs groups of whole 16 rows, got steps of {groups.step}")
    if min(tile.split_k, tile.segments) != 1:
        found = f"split_k {tile.split_k} and segments {tile.segments}"
        raise ValueError(f"split_k or segments must be 1 and none below, got {found}")
    return tile


def check_tiles(num_tiles: int, tile: TileConfig) -> None:
    """ValueError where there are more split tiles than arrival counters."""
    if num_tiles > MAX_TILES:
        raise ValueError(
            f"split_k {tile.split_k} of {num_tiles} output tiles; at most {MAX_TILES} can be split"
        )
