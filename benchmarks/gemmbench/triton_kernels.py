"""Kernels to compare with: streaming alone, a plain tiled GEMM.

`load_only` is the twin of the fused kernel: the same packed bytes, grid and pipeline without the
arithmetic, so its time is what the memory system allows that tile on this very device and run.
"""

import torch
import triton
import triton.language as tl

from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.metadata import tile_metadata, vector_of, vector_ptrs
from fusedq_kernels.geometry import BLOCK_K, group_geometry
from fusedq_kernels.types import PackedWeight, TileConfig

# tokens x outputs x K of the plain GEMM, for few and for many tokens
_SMALL_TILE, _LARGE_TILE = (16, 128, 128), (128, 128, 64)


@triton.jit
def _load_only_kernel(
    qweight_ptr,
    scales_ptr,
    out_ptr,
    n_padded,
    last_group,
    num_blocks,
    blocks_per_split,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid `(1, n_padded // BLOCK_N, split_k)`; XORs what the fused kernel would decode."""
    pid_n = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    qweight_ptrs = qweight_ptr + offs_n[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    stride_block = n_padded.to(tl.int64) * WORDS
    first_block = pid_k * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, num_blocks)
    words = tl.zeros((BLOCK_N, WORDS), tl.int32)
    vectors_ptrs = vector_ptrs(scales_ptr, pid_n * BLOCK_N, BLOCK_N, VECTOR, PAIRED, False)
    stride_vector = (n_padded // 2 if PAIRED else n_padded) * VECTOR
    metadata = tl.load(vectors_ptrs)
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        words ^= tl.load(qweight_ptrs + block * stride_block)
        if STEPS_PER_GROUP != 0:
            for sub in tl.static_range(0, STEPS, VECTOR):
                vector = vector_of(block, sub, 0, last_group, STEPS, STEPS_PER_GROUP, VECTOR)
                metadata ^= tl.load(vectors_ptrs + vector * stride_vector)
    if VECTOR > 1:
        metadata = tl.xor_sum(metadata, 1)
    folded = tl.xor_sum(words, 1) ^ tile_metadata(metadata, 0, BLOCK_N, 1, PAIRED, False)
    tl.store(out_ptr + pid_k.to(tl.int64) * n_padded + offs_n, folded)


def load_only(packed: PackedWeight, tile: TileConfig) -> torch.Tensor:
    """Read every byte of a tiled weight with the grid of `tile`; int32 `[split_k, n_padded]`."""
    num_blocks, n_padded, words = packed.qweight.shape
    groups = group_geometry(packed.k, packed.spec.group_size, packed.phase)
    out = packed.qweight.new_empty((tile.split_k, n_padded))
    constants = gemm.weight_constants(packed.spec, groups)
    _load_only_kernel[(1, n_padded // tile.block_n, tile.split_k)](
        packed.qweight,
        packed.scales.view(torch.int32),
        out,
        n_padded,
        groups.last_group,
        num_blocks,
        triton.cdiv(num_blocks, tile.split_k),
        **{name: constants[name] for name in ("STEPS_PER_GROUP", "VECTOR", "PAIRED")},
        WORDS=words,
        STEPS=BLOCK_K // groups.step,
        BLOCK_N=tile.block_n,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def _tiled_gemm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`y[M, N] = x[M, K] @ w[N, K].T`, one tile per program, grid over tiles."""
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs + k, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + k, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
        if INTERPRET:
            # The interpreter multiplies the uint16 images of bf16.
            acc += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def tiled_gemm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`x [M, K] @ w [N, K].T` by an ordinary Triton GEMM, for contiguous 16-bit operands."""
    m, k = x.shape
    n = w.shape[0]
    block_m, block_n, block_k = _SMALL_TILE if m <= 64 else _LARGE_TILE
    y = x.new_empty((m, n))
    _tiled_gemm_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        x,
        w,
        y,
        m,
        n,
        k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NUM_STAGES=4,
        INTERPRET=gemm.INTERPRETED,
        num_warps=8 if m > 64 else 4,
        num_stages=4,
    )
    return y
