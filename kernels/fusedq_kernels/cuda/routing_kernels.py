"""The kernels around an expert's products; `routing.py` launches them and explains the terms.

All count in integers or add in one order: the same results on every run.
"""

import triton
import triton.language as tl

from fusedq_kernels.cuda.rounding import to_output


@triton.jit
def _local_experts(ids_ptr, map_ptr, offs, num_slots, num_ids, num_experts, HAS_MAP: tl.constexpr):
    """The expert of this rank that each slot chose, `num_experts` for none."""
    ids = tl.load(ids_ptr + offs, mask=offs < num_slots, other=-1).to(tl.int32)
    if HAS_MAP:
        known = (ids >= 0) & (ids < num_ids)
        ids = tl.load(map_ptr + ids, mask=known, other=-1).to(tl.int32)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts)


@triton.jit(
    do_not_specialize=["num_slots", "num_ids", "num_experts"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)
def count_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    num_slots,
    num_ids,
    num_experts,
    HAS_MAP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Row `pid` of `counts_ptr`, int32 `[chunks, BLOCK_E]`: slots of a chunk by local expert."""
    pid = tl.program_id(0)
    offs = pid * CHUNK + tl.arange(0, CHUNK)
    experts = _local_experts(ids_ptr, map_ptr, offs, num_slots, num_ids, num_experts, HAS_MAP)
    counts = tl.histogram(experts, BLOCK_E)
    tl.store(counts_ptr + pid * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(
    do_not_specialize=["num_slots", "num_ids", "num_experts", "num_blocks"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    slots_ptr,
    experts_ptr,
    num_slots,
    num_ids,
    num_experts,
    num_blocks,
    HAS_MAP: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The slots of one chunk to their positions; grid `(chunks,)`.

    BLOCK_E is a power of two above `num_experts`: the one beyond them counts slots of no expert
    here. With COUNTED `counts_ptr` is what `count_kernel` wrote, else there is one chunk. Loops are
    unrolled to have several loads in flight.
    """
    pid, chunks = tl.program_id(0), tl.num_programs(0)
    local = tl.arange(0, CHUNK)
    offs = pid * CHUNK + local
    experts = _local_experts(ids_ptr, map_ptr, offs, num_slots, num_ids, num_experts, HAS_MAP)
    every = tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    if COUNTED:
        counts = tl.zeros((BLOCK_E,), tl.int32)
        for chunk in tl.range(chunks, loop_unroll_factor=8):
            of_chunk = tl.load(counts_ptr + chunk * BLOCK_E + every)
            counts += of_chunk
            before += tl.where(chunk < pid, of_chunk, 0)
    else:
        counts = tl.histogram(experts, BLOCK_E)
    counts = tl.where(every < num_experts, counts, 0)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    first = tl.cumsum(padded) - padded

    rank = tl.zeros((CHUNK,), tl.int32)
    for start in tl.range(0, CHUNK, BESIDE, loop_unroll_factor=4):
        others = start + tl.arange(0, BESIDE)
        theirs = _local_experts(
            ids_ptr, map_ptr, pid * CHUNK + others, num_slots, num_ids, num_experts, HAS_MAP
        )
        same = (experts[:, None] == theirs[None, :]) & (others[None, :] < local[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    position = tl.gather(first + before, experts, 0) + rank
    here = experts < num_experts
    tl.store(slots_ptr + position, offs, mask=here)
    # The first slot of a block says whose block it is.
    tl.store(experts_ptr + position // BLOCK_M, experts, mask=here & (position % BLOCK_M == 0))

    for row in range(pid, BLOCK_M - 1, chunks):
        tl.store(slots_ptr + first + counts + row, num_slots, mask=row < padded - counts)
    used = tl.sum(padded) // BLOCK_M
    for start in range(used + pid * BLOCK_E, num_blocks, chunks * BLOCK_E):
        tl.store(experts_ptr + start + every, -1, mask=start + every < num_blocks)


@triton.jit(
    do_not_specialize=["num_ids", "num_experts"],
    do_not_specialize_on_alignment=["weights_ptr", "ids_ptr", "map_ptr"],
)
def sum_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    N,
    num_ids,
    num_experts,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`out[t] = sum over j of weights[t, j] * y[t * TOP_K + j]`, j ascending, in fp32.

    Grid `(tokens, cdiv(N, BLOCK_N))`. Slots of no expert here are not read and count nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        expert = tl.load(ids_ptr + slot).to(tl.int32)
        if HAS_MAP:
            known = (expert >= 0) & (expert < num_ids)
            expert = tl.load(map_ptr + expert, mask=known, other=-1).to(tl.int32)
        width = tl.where((expert >= 0) & (expert < num_experts), N, 0)
        part = tl.load(y_ptr + slot * N + offs_n, mask=offs_n < width, other=0.0)
        weighted = part.to(tl.float32) * tl.load(weights_ptr + slot)
        total += tl.where(offs_n < width, weighted, 0.0)
    out = to_output(total, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + token * N + offs_n, out, mask=offs_n < N)


@triton.jit(do_not_specialize=["num_slots"])
def reorder_kernel(
    x_ptr,
    perm_ptr,
    slots_ptr,
    experts_ptr,
    out_ptr,
    num_slots,
    features,
    K,
    TOP_K: tl.constexpr,
    X_SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out[p, k] = x[row of p, perm[expert of p, k]]`; grid `(blocks, cdiv(K, BLOCK_K))`.

    The row of position p is p with X_SORTED, else the token of its slot.
    """
    block = tl.program_id(0)
    expert = tl.load(experts_ptr + block).to(tl.int64)
    if expert < 0:
        return
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    columns = tl.load(perm_ptr + expert * K + offs_k, mask=mask_k, other=0)
    for i in range(BLOCK_M):
        position = block * BLOCK_M + i
        slot = tl.load(slots_ptr + position)
        row = position if X_SORTED else slot // TOP_K
        mask = offs_k < tl.where(slot < num_slots, K, 0)
        values = tl.load(x_ptr + row.to(tl.int64) * features + columns, mask=mask)
        tl.store(out_ptr + position.to(tl.int64) * K + offs_k, values, mask=mask)
