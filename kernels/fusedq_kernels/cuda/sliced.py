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

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fusedq_kernels.call import Call
from fusedq_kernels.choose.slices import slice_rows
from fusedq_kernels.cuda.decode import BLOCK_K, decoded_rows, of_step
from fusedq_kernels.cuda.gemm import FP_FUSION, is_narrow, weight_constants
from fusedq_kernels.cuda.hooks import named_for_hooks
from fusedq_kernels.cuda.launcher import Launcher
from fusedq_kernels.cuda.metadata import num_vectors, row_metadata, row_scales, scale_of, vector_of
from fusedq_kernels.cuda.rounding import scaled, scaled_by_rows
from fusedq_kernels.geometry import BLOCK_N as LAYOUT_BLOCK_N
from fusedq_kernels.geometry import GroupGeometry, group_geometry, round_up
from fusedq_kernels.types import PackedWeight, QuantSpec

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
    TAIL: tl.constexpr,
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
    if TAIL > 0:
        behind = num_vectors(tl.num_programs(0), last_group, STEPS, VECTOR)
        of_row = row_scales(scales_ptr, behind, offs_n, n_padded, mask_n, VECTOR, PAIRED)
    for sub in tl.static_range(STEPS):
        vector = vector_of(block, sub, first_step, last_group, STEPS, STEPS_PER_GROUP, VECTOR)
        metadata = row_metadata(
            scales_ptr, vector, offs_n, n_padded, mask_n, sub % VECTOR, VECTOR, PAIRED
        )
        weight = DECODE(words, metadata, sub // PARTS, ROWS, DTYPE, INTERPRET)
        scale = scale_of(metadata, SCALE_DTYPE)
        if TAIL > 0:
            weight = scaled_by_rows(weight, scale, of_row, INTERPRET)
        else:
            weight = scaled(weight, scale, NARROW_SCALE, INTERPRET)
        k = block * BLOCK_K + sub // PARTS * ROWS - pad
        mask_k = of_step((k + offs_k >= 0) & (k + offs_k < K), offs_k, sub, STEP)
        tl.store(out_ptrs + k, weight, mask=mask_n[:, None] & mask_k[None, :])


def slice_constants(
    spec: QuantSpec, groups: GroupGeometry, act_dtype: torch.dtype
) -> dict[str, object]:
    """The constexpr arguments of `dequantize_slice_kernel`; shared with the audit."""
    return weight_constants(spec, groups) | {
        "NARROW_SCALE": is_narrow(spec.scale_dtype, act_dtype),
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
    _dequantizer(packed.spec, packed.n, packed.k, packed.phase, out.dtype)(
        packed.qweight, packed.scales, out, start
    )
    return out


def _dequantizer(
    spec: QuantSpec, n: int, k: int, phase: int, dtype: torch.dtype
) -> Callable[..., None]:
    """`write(qweight, scales, out, start)` for one weight, as `dequantize`."""
    groups = group_geometry(k, spec.group_size, phase)
    num_blocks, n_padded = groups.k_padded // BLOCK_K, round_up(n, LAYOUT_BLOCK_N)
    of_weight = (k, n_padded, groups.pad, groups.first_step, groups.last_group)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": FP_FUSION}
    launcher = Launcher(dequantize_slice_kernel, slice_constants(spec, groups, dtype), options)

    def write(qweight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, start: int) -> None:
        rows = out.shape[0]
        places = qweight.data_ptr() | scales.data_ptr() | out.data_ptr()
        grid = (num_blocks, triton.cdiv(rows, BLOCK_N), 1)
        launcher.launch(grid, places, qweight, scales, out, start, rows, *of_weight)

    return write


def prepare(call: Call, tile: None = None) -> Callable[..., None]:
    """`run(x, qweight, scales, zeros, bias, out)` for one layer; see `catalogue.Kernel.prepare`."""
    n, k = call.n, call.k
    write = _dequantizer(call.spec, n, k, call.phase, call.dtype.torch)

    # A layer's bias asks for gradients by default, which `out=` refuses.
    @torch.no_grad()
    def run(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        rows = slice_rows(n, k)
        workspace = torch.empty((rows, k), dtype=x.dtype, device=x.device)
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            weight, columns = workspace[: stop - start], out[:, start:stop]
            write(qweight, scales, weight, start)
            if bias is None:
                torch.mm(x, weight.t(), out=columns)
            else:
                torch.addmm(bias[start:stop], x, weight.t(), out=columns)

    return run
