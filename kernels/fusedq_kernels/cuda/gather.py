"""Rows of a packed weight by their numbers, dequantized: triton-gather.

A program reads one K block of some rows and decodes it with the decoders of the matrix product, so
that an embedding and a tied lm_head share one weight and one arithmetic. Only the rows that are
asked for are read.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fusedq_kernels.call import Call
from fusedq_kernels.cuda.decode import BLOCK_K, decoded_rows, of_step
from fusedq_kernels.cuda.gemm import FP_FUSION, weight_constants
from fusedq_kernels.cuda.hooks import named_for_hooks
from fusedq_kernels.cuda.launcher import Launcher
from fusedq_kernels.cuda.metadata import num_vectors, row_metadata, row_scales, scale_of, vector_of
from fusedq_kernels.cuda.rounding import scaled, scaled_by_rows
from fusedq_kernels.geometry import BLOCK_N, GroupGeometry, group_geometry, round_up
from fusedq_kernels.types import QuantSpec

# One warp takes a K block of 8 rows: 16 bytes of 4-bit codes to a thread.
BLOCK_M = 8
NUM_WARPS = 1


# One binary for any number of rows and any size of the weight, wherever the ids start.
@named_for_hooks
@triton.jit(do_not_specialize=["M", "N", "last_group"], do_not_specialize_on_alignment=["ids_ptr"])
def gather_kernel(
    ids_ptr,
    qweight_ptr,
    scales_ptr,
    perm_ptr,
    y_ptr,
    M,
    N,
    K,
    n_padded,
    last_group,
    DECODE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    TAIL: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    HAS_PERM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Columns `[128 * pid_k, 128 * pid_k + 128)` of BLOCK_M rows of y.

    Grid `(cdiv(M, BLOCK_M), n_blocks)`. STEPS_PER_GROUP is 0 when one group spans all of K. With
    HAS_PERM, row k of the weight is column `perm[k]` of y. An id outside of `[0, N)` gets zeros.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    STEPS: tl.constexpr = BLOCK_K // STEP
    ROWS: tl.constexpr = decoded_rows(STEP)
    PARTS: tl.constexpr = ROWS // STEP
    block = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)
    known = (ids >= 0) & (ids < N)
    rows = tl.where(known, ids, 0).to(tl.int64)
    offs_k = tl.arange(0, ROWS)
    first = (block.to(tl.int64) * n_padded + rows) * WORDS
    words = tl.load(qweight_ptr + first[:, None] + tl.arange(0, WORDS)[None, :])
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * K
    if TAIL > 0:
        behind = num_vectors(tl.num_programs(1), last_group, STEPS, VECTOR)
        of_row = row_scales(scales_ptr, behind, rows, n_padded, known, VECTOR, PAIRED)
    for sub in tl.static_range(STEPS):
        vector = vector_of(block, sub, 0, last_group, STEPS, STEPS_PER_GROUP, VECTOR)
        metadata = row_metadata(
            scales_ptr, vector, rows, n_padded, known, sub % VECTOR, VECTOR, PAIRED
        )
        weight = DECODE(words, metadata, sub // PARTS, ROWS, DTYPE, INTERPRET)
        scale = scale_of(metadata, SCALE_DTYPE)
        if TAIL > 0:
            values = scaled_by_rows(weight, scale, of_row, INTERPRET)
        else:
            values = scaled(weight, scale, False, INTERPRET)
        columns = block * BLOCK_K + sub // PARTS * ROWS + offs_k
        mask_k = of_step(columns < K, offs_k, sub, STEP)
        if HAS_PERM:
            columns = tl.load(perm_ptr + columns, mask=mask_k, other=0)
        tl.store(y_ptrs + columns[None, :], values, mask=mask_m[:, None] & mask_k[None, :])


def gather_constants(spec: QuantSpec, groups: GroupGeometry, has_perm: bool) -> dict[str, object]:
    """The constexpr arguments of `gather_kernel`; shared by the launcher and the audit."""
    return weight_constants(spec, groups) | {"HAS_PERM": has_perm, "BLOCK_M": BLOCK_M}


def prepare(call: Call, tile: None = None) -> Callable[..., None]:
    """`run(ids, qweight, scales, zeros, perm, out)` for one weight; see `catalogue.Kernel.prepare`.

    Each value is rounded once; a row whose id is none of the weight's gets zeros.
    """
    groups = group_geometry(call.k, call.spec.group_size, call.phase)
    num_blocks, n_padded = groups.k_padded // BLOCK_K, round_up(call.n, BLOCK_N)
    of_weight = (call.n, call.k, n_padded, groups.last_group)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": FP_FUSION}
    launchers = [
        Launcher(gather_kernel, gather_constants(call.spec, groups, has_perm), options)
        for has_perm in (False, True)
    ]

    def run(
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        perm: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = len(ids)
        places = qweight.data_ptr() | scales.data_ptr() | out.data_ptr()
        places |= 0 if perm is None else perm.data_ptr()
        launchers[perm is not None].launch(
            *((triton.cdiv(m, BLOCK_M), num_blocks, 1), places),
            *(ids, qweight, scales, perm, out, m, *of_weight),
        )

    return run
