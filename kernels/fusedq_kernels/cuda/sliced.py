"""Sliced prefill: dequantize a slice of outputs into a workspace, multiply by cuBLAS, next slice.

With many tokens the tensor cores set the pace, and cuBLAS drives them better than a kernel that
decodes beside them. A slice is small enough to be read back from L2, so its 16-bit values cost no
traffic to DRAM, and one workspace serves all slices: the weight as a whole is never dequantized,
unless it is no larger than one slice. This kernel is declared: `heuristics.select` names it where a
measured row does, never by rule, and every plan says so with the bytes of its workspace.

A weight is decoded exactly, scaled in fp32 and rounded once to the dtype of the activations; the
sums are those of `torch.mm`. The workspace is allocated per call like the partial sums of split-K:
PyTorch's allocator hands it to one stream, and to a CUDA graph's own pool while that is captured.
"""

import torch
import triton
import triton.language as tl

from fusedq_kernels.choose.slices import slice_rows
from fusedq_kernels.cuda.decode import BLOCK_K, decoded_rows, of_step
from fusedq_kernels.cuda.gemm import FP_FUSION, check_operands, weight_constants
from fusedq_kernels.cuda.gemm_kernel import scaled
from fusedq_kernels.cuda.hooks import named_for_hooks
from fusedq_kernels.cuda.metadata import row_metadata, scale_of, vector_of
from fusedq_kernels.geometry import GroupGeometry, group_geometry
from fusedq_kernels.types import KernelName, Launch, PackedWeight, QuantSpec, layout_for

BLOCK_N = 64
NUM_WARPS = 4


@named_for_hooks
@triton.jit(do_not_specialize=["first_row", "num_rows", "first_step", "last_group"])
def dequantize_slice_kernel(
    qweight_ptr,
    scales_ptr,
    out_ptr,
    first_row,
    num_rows,
    K,
    n_padded,
    pad,
    first_step,
    last_group,
    DECODE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    NARROW_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Outputs `[first_row, first_row + num_rows)` into `out_ptr`, `[num_rows, K]`.

    Grid `(K blocks, cdiv(num_rows, BLOCK_N))`. `gemm_kernel.py` says what the other arguments mean.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    STEPS: tl.constexpr = BLOCK_K // STEP
    ROWS: tl.constexpr = decoded_rows(STEP)
    PARTS: tl.constexpr = ROWS // STEP
    block = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < num_rows
    offs_n = first_row + rows
    offs_k = tl.arange(0, ROWS)
    offs_words = (block.to(tl.int64) * n_padded + offs_n)[:, None] * WORDS
    qweight_ptrs = qweight_ptr + offs_words + tl.arange(0, WORDS)[None, :]
    words = tl.load(qweight_ptrs, mask=mask_n[:, None], other=0)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * K + offs_k[None, :]
    for sub in tl.static_range(STEPS):
        vector = vector_of(block, sub, first_step, last_group, STEPS, STEPS_PER_GROUP, VECTOR)
        metadata = row_metadata(
            scales_ptr, vector, offs_n, n_padded, mask_n, sub % VECTOR, VECTOR, PAIRED
        )
        weight = DECODE(words, metadata, sub // PARTS, ROWS, DTYPE, INTERPRET)
        weight = scaled(weight, scale_of(metadata, SCALE_DTYPE), NARROW_SCALE, INTERPRET)
        k = block * BLOCK_K + sub // PARTS * ROWS - pad
        mask_k = of_step((k + offs_k >= 0) & (k + offs_k < K), offs_k, sub, STEP)
        tl.store(out_ptrs + k, weight, mask=mask_n[:, None] & mask_k[None, :])


def slice_constants(
    spec: QuantSpec, groups: GroupGeometry, act_dtype: torch.dtype
) -> dict[str, object]:
    """The constexpr arguments of `dequantize_slice_kernel`; shared with the audit."""
    return weight_constants(spec, groups) | {
        "NARROW_SCALE": spec.scale_dtype.torch == act_dtype,
        "BLOCK_N": BLOCK_N,
    }


def dequantize(packed: PackedWeight, out: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Write `(code - zero) * scale` of outputs `[start, start + rows)` into `out` and return it.

    Args:
        packed: a weight in its tiled layout (P4, P8, PL4).
        out: `[rows, K]` fp16 or bf16, contiguous, on the device of `packed`, columns in the order
            in which the weight is stored.
        start: the first output.
    """
    groups = group_geometry(packed.k, packed.spec.group_size, packed.phase)
    num_blocks, n_padded, _ = packed.qweight.shape
    rows = out.shape[0]
    dequantize_slice_kernel[(num_blocks, triton.cdiv(rows, BLOCK_N))](
        packed.qweight,
        packed.scales,
        out,
        start,
        rows,
        packed.k,
        n_padded,
        groups.pad,
        groups.first_step,
        groups.last_group,
        **slice_constants(packed.spec, groups, out.dtype),
        num_warps=NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
    )
    return out


# A layer's bias asks for gradients by default, which `out=` refuses.
@torch.no_grad()
def sliced_gemm(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    launch: Launch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens by a packed weight, slice by slice; the arguments of `gemm.fused_gemm`.

    Raises:
        ValueError: another launch than of sliced-cublas, or as `gemm.fused_gemm` does.
    """
    if launch.kernel is not KernelName.SLICED_CUBLAS:
        raise ValueError(f"launch must be {KernelName.SLICED_CUBLAS.value}, got {launch}")
    layout = layout_for(launch.kernel, packed.spec.weight_type)
    if packed.layout is not layout:
        raise ValueError(f"sliced_gemm reads layout {layout.value}, got {packed.layout.value}")
    check_operands(x, packed, bias)
    m, n, k = x.shape[0], packed.n, packed.k
    y = torch.empty((m, n), dtype=x.dtype, device=x.device) if out is None else out
    if m == 0:
        return y
    rows = slice_rows(n, k)
    workspace = torch.empty((rows, k), dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        weight = dequantize(packed, workspace[: stop - start], start).t()
        columns = y[:, start:stop]
        if bias is None:
            torch.mm(x, weight, out=columns)
        else:
            torch.addmm(bias[start:stop], x, weight, out=columns)
    return y
