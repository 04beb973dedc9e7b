"""The fused dequantize-and-multiply kernel: `y = x @ dequantize(packed).T + bias`.

Owns the two Triton kernels and their launcher. `decode.py` turns packed words into values,
`layout.py` owns the packed form and its geometry, `heuristics.py` chooses the `Launch`.

The kernel computes `y.T = W @ x.T`: with the weight as FIRST operand of `tl.dot` the decoded tile
goes from registers straight into the tensor cores (wgmma takes its first operand from registers,
never its second). The group scale multiplies the fp32 partial product of its group, so a weight
is exact until the fp32 accumulation. Split-K partials go to a workspace and a second kernel adds
them in split order: no atomics, hence the same bits on every run.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

import torch
import triton
import triton.language as tl

from fusedq_kernels import geometry
from fusedq_kernels.decode import BLOCK_K, DECODERS
from fusedq_kernels.heuristics import ACT_DTYPES
from fusedq_kernels.types import (
    KernelName,
    Launch,
    PackedWeight,
    QuantSpec,
    TileConfig,
    layout_for,
)

# Pointers and these arguments are multiples of 16, which Triton's launch specialisation finds out
# by itself; without it the loads of x are narrower than a 16-byte asynchronous copy.
ALIGNMENT = 16
ALIGNED_ARGS = ("K", "n_padded", "pad", "stride_xm")

_TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_REDUCE_BLOCK = 512
# Fixed here because Triton's default is about to change and would change the last bit of results.
FP_FUSION = True


@triton.jit
def _to_output(acc, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Round fp32 to DTYPE, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter truncates; adding half a bf16 ulp first makes it round like a GPU.
        bits = acc.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return acc.to(DTYPE)


@triton.jit
def _dot(a, b, INTERPRET: tl.constexpr):
    if INTERPRET:
        # The interpreter multiplies the uint16 images of bf16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit(do_not_specialize=["M", "first_step", "last_group", "num_blocks", "blocks_per_split"])
def _fused_gemm_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    n_padded,
    pad,
    first_step,
    last_group,
    num_blocks,
    blocks_per_split,
    stride_xm,
    DECODE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One `[BLOCK_M, BLOCK_N]` tile of y over one split of K.

    Grid `(cdiv(M, BLOCK_M), n_padded // BLOCK_N, split_k)`. `first_step` is the group phase in
    units of STEP; STEPS_PER_GROUP is 0 when one group spans all of K. With PARTIAL, `out_ptr` is
    the fp32 workspace `[split_k, M, N]`, otherwise y itself.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STEPS: tl.constexpr = BLOCK_K // STEP

    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, STEP)
    mask_m = offs_m < M

    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    qweight_ptrs = qweight_ptr + offs_n[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales_ptrs = scales_ptr + offs_n
    stride_block = n_padded.to(tl.int64) * WORDS

    first_block = pid_k * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, num_blocks)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        words = tl.load(qweight_ptrs + block * stride_block)
        for sub in tl.static_range(STEPS):
            if STEPS_PER_GROUP == 0:
                group = 0
            else:
                group = (block * STEPS + sub + first_step) // STEPS_PER_GROUP
            if STEPS > 1:
                # Steps made of padding alone may lie beyond the last group.
                group = tl.minimum(group, last_group)
            metadata = tl.load(scales_ptrs + group * n_padded)
            k = block * BLOCK_K + sub * STEP - pad
            rows = k + offs_k
            mask_x = (rows >= 0) & (rows < K)
            x = tl.load(x_ptrs + k, mask=mask_m[None, :] & mask_x[:, None], other=0.0)
            weight, scale = DECODE(words, metadata, sub, STEP, DTYPE, SCALE_DTYPE, INTERPRET)
            acc += _dot(weight, x, INTERPRET) * scale[:, None]

    mask = mask_m[None, :] & (offs_n < N)[:, None]
    offs_out = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    if PARTIAL:
        out_ptr += pid_k.to(tl.int64) * M * N
        tl.store(out_ptr + offs_out, acc, mask=mask)
    else:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        tl.store(out_ptr + offs_out, _to_output(acc, DTYPE, INTERPRET), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _reduce_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`y[m, n] = sum_i partial[i, m, n] + bias[n]`, i ascending. Grid `cdiv(M * N, BLOCK)`."""
    size = M.to(tl.int64) * N
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + split * size + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, _to_output(acc, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


INTERPRETED = not isinstance(_fused_gemm_kernel, triton.runtime.JITFunction)


def kernel_constants(
    spec: QuantSpec, step: int, num_groups: int, tile: TileConfig, has_bias: bool
) -> dict[str, object]:
    """The constexpr arguments of `_fused_gemm_kernel`; shared by the launcher and the audit."""
    has_zero_points = spec.has_zero_points
    return {
        "DECODE": DECODERS[spec.weight_type],
        "SCALE_DTYPE": _TL_DTYPES[spec.scale_dtype] if has_zero_points else tl.float32,
        "WORDS": geometry.BLOCK_K * spec.weight_type.bits // 32,
        "STEP": step,
        "STEPS_PER_GROUP": spec.group_size // step if num_groups > 1 else 0,
        "HAS_BIAS": has_bias and tile.split_k == 1,
        "PARTIAL": tile.split_k > 1,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "NUM_STAGES": tile.num_stages,
        "INTERPRET": INTERPRETED,
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
    _check_operands(x, packed, bias)
    m, n, k = x.shape[0], packed.n, packed.k
    y = torch.empty((m, n), dtype=x.dtype, device=x.device) if out is None else out
    if m == 0:
        return y
    stride_xm = x.stride(0) if m > 1 else k
    if x.data_ptr() % ALIGNMENT or stride_xm % ALIGNMENT:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
        stride_xm = k

    target = y
    if tile.split_k > 1:
        target = torch.empty((tile.split_k, m, n), dtype=torch.float32, device=x.device)
    groups = geometry.group_geometry(k, packed.spec.group_size, packed.phase)
    num_blocks, n_padded, _ = packed.qweight.shape
    grid = (triton.cdiv(m, tile.block_m), n_padded // tile.block_n, tile.split_k)
    _fused_gemm_kernel[grid](
        x,
        packed.qweight,
        packed.scales,
        bias,
        target,
        m,
        n,
        k,
        n_padded,
        groups.pad,
        groups.offset // groups.step,
        groups.num_groups - 1,
        num_blocks,
        triton.cdiv(num_blocks, tile.split_k),
        stride_xm,
        **kernel_constants(packed.spec, groups.step, groups.num_groups, tile, bias is not None),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=FP_FUSION,
    )
    if tile.split_k > 1:
        _reduce_kernel[(triton.cdiv(m * n, _REDUCE_BLOCK),)](
            target,
            bias,
            y,
            m,
            n,
            SPLIT_K=tile.split_k,
            HAS_BIAS=bias is not None,
            BLOCK=_REDUCE_BLOCK,
            INTERPRET=INTERPRETED,
            enable_fp_fusion=FP_FUSION,
        )
    return y


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
    if tile.split_k < 1:
        raise ValueError(f"split_k must be at least 1, got {tile.split_k}")
    return tile


def _check_operands(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> None:
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
