"""The fused kernel itself: one `@triton.jit` for every weight type, tile and phase of serving.

It computes `y.T = W @ x.T`: with the weight as FIRST operand of `tl.dot` the decoded tile goes from
registers straight into the tensor cores (wgmma takes its first operand from registers, never its
second). `decode.py` turns packed words into values, `gemm.py` launches.

Where the scale goes. By default it multiplies the fp32 partial product of its group: a weight is
exact until the fp32 accumulation. One group over all of K multiplies once, at the end. With
SCALE_WEIGHTS it multiplies the weight in 16 bits, which lets the tensor cores run on without
waiting for a partial product, at the price of rounding each weight once.

Split-K. The programs of a tile store fp32 partial sums and count themselves in
(`arrivals.py`); the last one adds all sums in the order of K, whoever came last, hence the same
bits on every run. The order of memory: all threads store, a barrier of the block makes the stores
precede thread 0's atomic add, whose release at GPU scope covers them (release is cumulative in
PTX); the add that finds the tile complete acquires every earlier one, a barrier passes that on to
its block, and `.cg` loads read the sums from L2. Floating-point atomics, which add in any order,
are not used.

Experts. With TOP_K the weight is one of many behind each other, and a block of BLOCK_M tokens
belongs to one of them: `routing.py` sorts the choices of all tokens by expert and says which. A
choice is a slot, `token * TOP_K + choice`; where it stands in that order is its position.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import triton
import triton.language as tl

from fusedq_kernels.cuda.activations import activated, values_per_output
from fusedq_kernels.cuda.decode import BLOCK_K, decoded_rows, of_step
from fusedq_kernels.cuda.floats import lifted_scales
from fusedq_kernels.cuda.hooks import named_for_hooks
from fusedq_kernels.cuda.metadata import (
    num_vectors,
    row_scales,
    scale_of,
    stored_scale,
    tile_metadata,
    vector_of,
    vector_ptrs,
)
from fusedq_kernels.cuda.planes import has_ptx
from fusedq_kernels.cuda.rounding import scaled, to_output


@triton.jit
def _dot(a, b, acc, INTERPRET: tl.constexpr):
    """`a @ b + acc`."""
    if INTERPRET:
        # The interpreter multiplies the uint16 images of bf16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def tile_of(SPLIT_K: tl.constexpr):
    """Token tile, output tile and split of this program in the grid of `gemm.launch_grid`."""
    if SPLIT_K > 1:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2)
    else:
        return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.program_id(1), 0


@triton.jit
def _finished(acc, INTERPRET: tl.constexpr):
    """`acc`, once no wgmma adds to it any more: the same bits, and not one instruction.

    wgmma goes on reading the decoded weight from registers while the warp runs on. Of a sum that is
    not used within the loop, Triton lets the products of one block run on into the next, whose
    decoding then overwrites what they read (3.6 lets seven of eight run on, 3.7 and 3.8 one). Where
    ptxas notices, it serialises them; where it does not, outputs are wrong, other ones in each run
    (triton-lang/triton issue 9433). Empty assembly that takes the sum and gives it back is a use,
    and before a use Triton waits for all of them. A wait written as assembly would stand there once
    for every register and bind the compiler to nothing. `audit/hazards.py` looks for the fault in
    the machine code of every variant.
    """
    if INTERPRET or not has_ptx():
        return acc
    else:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


# One binary for any number of tokens, position of groups and bias, wherever it starts.
@named_for_hooks
@triton.jit(
    do_not_specialize=[
        *("M", "first_step", "last_group", "num_blocks", "blocks_per_part"),
        *("num_routed", "num_experts"),
    ],
    do_not_specialize_on_alignment=["bias_ptr", "experts_ptr"],
)
def fused_gemm_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrivals_ptr,
    M,
    N,
    K,
    n_padded,
    pad,
    first_step,
    last_group,
    num_blocks,
    blocks_per_part,
    stride_xm,
    slots_ptr,
    experts_ptr,
    num_routed,
    num_experts,
    DECODE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    HEADROOM: tl.constexpr,
    QUARTERS: tl.constexpr,
    OWN_ROW: tl.constexpr,
    NARROW_SCALE: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    TAIL: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    TOP_K: tl.constexpr,
    ALONE: tl.constexpr,
    X_SORTED: tl.constexpr,
    Y_SORTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One `[BLOCK_M, BLOCK_N]` tile of y over one split of K, or over SEGMENTS of them in order.

    Grid: `gemm.launch_grid`. `first_step` is the group phase in units of STEP; STEPS_PER_GROUP is 0
    when one group spans all of K. `metadata.py` explains VECTOR, PAIRED, TAIL and OWN_ROW. With
    SPLIT_K above 1, `partial_ptr` is fp32 `[SPLIT_K, M, N]` and `arrivals_ptr` int32, zero, one per
    tile. SPLIT_K or SEGMENTS is 1; both cut K every `blocks_per_part` blocks and add the parts in
    the same order.
    With X_DESCRIPTOR, `x_ptr` is a tensor descriptor of x in blocks of `[BLOCK_M, STEP]`, which the
    tensor memory accelerator (sm_90 and newer) loads by one instruction; STEP is 16 at least then.

    TOP_K is 0 but for experts. There M counts slots, `slots_ptr` int32 says which slot is at each
    position, M where there is none, and `experts_ptr` which of `num_experts` each of `num_routed`
    blocks of positions is for, another number for none. Row m of x is of position m with X_SORTED,
    else of token m; row m of y is of position m with Y_SORTED, else of slot m; partial sums are of
    slots. With ALONE there is one token: slot i is by itself in block i, and `experts_ptr` says
    which expert each chose. ACTIVATION, of `activations.py`, may be None; where it takes pairs y is
    half as wide as N.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    STEPS: tl.constexpr = BLOCK_K // STEP
    # Tensor cores take 16 rows at least: a finer step multiplies its 16 rows with the others of x
    # masked to zero.
    ROWS: tl.constexpr = decoded_rows(STEP)
    PARTS: tl.constexpr = ROWS // STEP
    SCALE_LAST: tl.constexpr = STEPS_PER_GROUP == 0 and not SCALE_STEPS
    SUMS_IN_FLIGHT: tl.constexpr = 8 if BLOCK_M * BLOCK_N <= 2048 else 1
    pid_m, pid_n, pid_k = tile_of(SPLIT_K)
    if SPLIT_K == 1 and TOP_K == 0:
        # The last group of token tiles may be one short: a loop of no blocks, not a branch around
        # it, which costs the compiler registers.
        num_blocks = tl.where(pid_m * BLOCK_M < M, num_blocks, 0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_x = offs_m
    rows_y = offs_m
    if TOP_K > 0:
        expert = tl.load(experts_ptr + pid_m, mask=pid_m < num_routed, other=-1).to(tl.int64)
        if (expert < 0) | (expert >= num_experts):
            return
        if ALONE:
            offs_m = tl.where(tl.arange(0, BLOCK_M) == 0, pid_m, M)
        else:
            offs_m = tl.load(slots_ptr + offs_m)
        if not X_SORTED:
            rows_x = offs_m // TOP_K
        if not Y_SORTED:
            rows_y = offs_m
        qweight_ptr += expert * num_blocks * n_padded * WORDS
        vectors_of_one = num_vectors(num_blocks, last_group, STEPS, VECTOR) + TAIL
        scales_ptr += expert * vectors_of_one * (n_padded // 2 if PAIRED else n_padded) * VECTOR
        if HAS_BIAS:
            bias_ptr += expert * N
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, ROWS)
    mask_m = offs_m < M
    if not X_DESCRIPTOR:
        x_ptrs = x_ptr + rows_x.to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    qweight_ptrs = qweight_ptr + offs_n[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales_ptrs = vector_ptrs(scales_ptr, pid_n * BLOCK_N, BLOCK_N, VECTOR, PAIRED, OWN_ROW)
    stride_vector = (n_padded // 2 if PAIRED else n_padded) * VECTOR
    stride_block = n_padded.to(tl.int64) * WORDS
    if STEPS_PER_GROUP == 0:
        metadata = tile_metadata(tl.load(scales_ptrs), 0, BLOCK_N, VECTOR, PAIRED, OWN_ROW)
    mask = mask_m[None, :] & (offs_n < N)[:, None]
    offs_y = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for segment in range(SEGMENTS):
        first_block = (pid_k + segment) * blocks_per_part
        last_block = tl.minimum(first_block + blocks_per_part, num_blocks)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
            words = tl.load(qweight_ptrs + block * stride_block)
            for sub in tl.static_range(STEPS):
                if STEPS_PER_GROUP != 0:
                    if sub % VECTOR == 0:
                        vector = vector_of(
                            *(block, sub, first_step, last_group),
                            *(STEPS, STEPS_PER_GROUP, VECTOR),
                        )
                        vectors = tl.load(scales_ptrs + vector * stride_vector)
                        if HEADROOM > 0:
                            vectors = lifted_scales(vectors, DTYPE, INTERPRET)
                    metadata = tile_metadata(
                        vectors, sub % VECTOR, BLOCK_N, VECTOR, PAIRED, OWN_ROW
                    )
                k = block * BLOCK_K - pad
                # Not named, because a name would make a run-time value of `sub // PARTS * ROWS`.
                if X_DESCRIPTOR:
                    # What lies outside x, before the first feature too, reads as zero.
                    tokens = tl.trans(x_ptr.load([pid_m * BLOCK_M, k + sub // PARTS * ROWS]))
                else:
                    # Negative rows are large unsigned ones.
                    rows = (k + (offs_k + sub // PARTS * ROWS)).to(tl.uint32)
                    mask_k = of_step(rows < K.to(tl.uint32), offs_k, sub, STEP)
                    mask_x = mask_m[None, :] & mask_k[:, None]
                    tokens = tl.load(x_ptrs + k + sub // PARTS * ROWS, mask=mask_x, other=0.0)
                weight = DECODE(words, metadata, sub // PARTS, ROWS, DTYPE, INTERPRET)
                if SCALE_LAST:
                    acc = _dot(weight, tokens, acc, INTERPRET)
                elif SCALE_WEIGHTS:
                    scale = stored_scale(metadata, SCALE_DTYPE)
                    weight = scaled(weight, scale, NARROW_SCALE, INTERPRET)
                    acc = _dot(weight, tokens, acc, INTERPRET)
                else:
                    scale = scale_of(metadata, SCALE_DTYPE)
                    if QUARTERS and sub % 2 == 1:
                        scale *= 4
                    acc += _dot(weight, tokens, None, INTERPRET) * scale[:, None]
            if SCALE_LAST or SCALE_WEIGHTS:
                acc = _finished(acc, INTERPRET)
        if SEGMENTS == 1:
            total = acc
        else:
            total += acc

    if SPLIT_K > 1:
        split_size = M.to(tl.int64) * N
        tl.store(partial_ptr + pid_k * split_size + offs_y, total, mask=mask)
        tl.debug_barrier()
        arrivals_ptr += pid_n * tl.num_programs(0) + pid_m
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLIT_K - 1:
            return
        tl.store(arrivals_ptr, 0)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # Sums in flight hide each other's latency, as long as registers last.
        for split in tl.range(SPLIT_K, loop_unroll_factor=SUMS_IN_FLIGHT):
            ptrs = partial_ptr + split * split_size + offs_y
            total += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    if HEADROOM > 0:
        total *= 1 << HEADROOM
    if SCALE_LAST:
        total *= scale_of(metadata, SCALE_DTYPE)[:, None]
    if TAIL > 0:
        behind = num_vectors(num_blocks, last_group, STEPS, VECTOR)
        of_row = row_scales(scales_ptr, behind, offs_n, n_padded, offs_n < N, VECTOR, PAIRED)
        total *= of_row[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        total += bias.to(tl.float32)[:, None]
    if TOP_K > 0:
        total = activated(total, ACTIVATION, LIMIT, ALPHA, BETA)
        WIDTH: tl.constexpr = BLOCK_N // values_per_output(ACTIVATION)
        offs_n = pid_n * WIDTH + tl.arange(0, WIDTH)
        N = N // values_per_output(ACTIVATION)
        mask = mask_m[None, :] & (offs_n < N)[:, None]
        offs_y = rows_y.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptr + offs_y, to_output(total, DTYPE, INTERPRET), mask=mask)
