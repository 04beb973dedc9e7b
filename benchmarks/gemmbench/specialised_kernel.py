"""A kernel for prefill on Hopper whose warps have different work: one loads, two groups multiply.

Computes tiles of `y.T = W @ x.T` as `fused_gemm_kernel` does with SCALE_WEIGHTS: the decoded
weight, scaled in 16 bits, is the first operand of wgmma and stays in registers. Written in Gluon,
where waiting is explicit; one program per SM takes tile after tile. Its warps are

- a producer: one warp that has the tensor memory accelerator fetch x, 64 columns at a time, and
  packed words, a block of 128 rows at a time, into two rings in shared memory;
- two consumers: a warpgroup for each half of a tile's outputs. While the tensor cores multiply a
  block, the consumer decodes its next one into other registers; while one waits, the other
  multiplies.

Each stage of a ring has two barriers, `full` (the copy has landed) and `empty` (both consumers have
read it). A barrier's phase flips each time that it completes; a wait for the phase before the first
one passes at once, which is how the producer starts.

wgmma reads its first operand from registers while the warp runs on: `warpgroup_mma_wait` takes the
weight as well as the sum, so that nothing writes those registers before (triton-lang/triton 9433).
"""

# Gluon knows no starred list.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.8 renamed both.
_async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK_N = 128
# Columns of x that one copy fetches: rows of 128 bytes, the widest swizzle.
STEP_K = 64
# Registers a thread at launch, and what each kind of warp goes on with: 64,512 and 64,896 in all.
LAUNCH_REGISTERS = 168
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24

_OUTPUTS = gl.constexpr(BLOCK_N // 2)
_STEP_K = gl.constexpr(STEP_K)
_BLOCK_N = gl.constexpr(BLOCK_N)
# Words of a consumer as its threads need them: rows lane // 4 and 8 more, words lane % 4 and 4 i
# more. Planes of those are, in order, the first operand of wgmma.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[BLOCK_N // 2, 16],
    )
)


@gluon.jit
def tile_at(index, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Token tile and output tile: GROUP token tiles walk over all outputs, then the next GROUP."""
    first = index // (GROUP * tiles_n) * GROUP
    count = gl.minimum(tiles_m - first, GROUP)
    inside = index % (GROUP * tiles_n)
    return first + inside % count, inside // count


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Behind the last stage of a ring comes its first, in the other phase."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def produce(x_desc, words_desc, rings, sizes, GROUP: gl.constexpr):
    """Fill both rings with every block of every tile of this program."""
    x_ring, x_full, x_empty, words_ring, words_full, words_empty = rings
    _, n_padded, _, num_blocks, tiles_m, tiles_n = sizes
    X_STAGES: gl.constexpr = x_ring.type.shape[0]
    WORDS_STAGES: gl.constexpr = words_ring.type.shape[0]
    BLOCK_M: gl.constexpr = x_ring.type.shape[1]
    x_stage, x_phase = gl.to_tensor(0), gl.to_tensor(1)
    words_stage, words_phase = gl.to_tensor(0), gl.to_tensor(1)
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP)
        for block in range(num_blocks):
            full = words_full.index(words_stage)
            mbarrier.wait(words_empty.index(words_stage), words_phase)
            mbarrier.expect(full, words_desc.block_type.nbytes)
            row = block * n_padded + tile_n * _BLOCK_N
            _async_load(words_desc, [row, 0], full, words_ring.index(words_stage))
            words_stage, words_phase = next_stage(words_stage, words_phase, WORDS_STAGES)
            for half in gl.static_range(2):
                full = x_full.index(x_stage)
                mbarrier.wait(x_empty.index(x_stage), x_phase)
                mbarrier.expect(full, x_desc.block_type.nbytes)
                column = block * (2 * _STEP_K) + half * _STEP_K
                _async_load(x_desc, [tile_m * BLOCK_M, column], full, x_ring.index(x_stage))
                x_stage, x_phase = next_stage(x_stage, x_phase, X_STAGES)


@gluon.jit
def metadata_at(ptrs, block, first_step, last_block, stride, STEPS_PER_GROUP: gl.constexpr):
    """Words of the group of a block, of the last one beyond it."""
    block = gl.minimum(block, last_block)
    if STEPS_PER_GROUP == 0:
        return gl.load(ptrs)
    return gl.load(ptrs + (block + first_step) // STEPS_PER_GROUP * stride)


@gluon.jit
def decoded(
    words, metadata, PAIRED: gl.constexpr, PTX: gl.constexpr, DTYPE: gl.constexpr, A: gl.constexpr
):
    """Two of the four planes of words, scaled: `[outputs, 64]`, columns in natural order."""
    if PAIRED:
        # Rows r and r + 8 share a word, whose lower half is the former's.
        rows = gl.arange(0, _OUTPUTS, gl.SliceLayout(1, WORDS))
        metadata = metadata << (16 - ((rows & 8) << 1))
    metadata = gl.expand_dims(metadata, 1).broadcast_to((_OUTPUTS, 16))
    first, second = gl.inline_asm_elementwise(
        PTX, "=r,=r,r,r", [words, metadata], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    pairs = gl.reshape(gl.permute(gl.join(first, second), (0, 2, 1)), (_OUTPUTS, 32))
    low = (pairs & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    tile = gl.reshape(gl.join(low, high), (_OUTPUTS, _STEP_K))
    return gl.convert_layout(tile, A, assert_trivial=True)


@gluon.jit
def consume(
    y_desc,
    scales_ptr,
    bias_ptr,
    y_buffers,
    rings,
    sizes,
    PART: gl.constexpr,
    GROUP: gl.constexpr,
    STEPS_PER_GROUP: gl.constexpr,
    PAIRED: gl.constexpr,
    DECODE_LOW: gl.constexpr,
    DECODE_HIGH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Half PART of the outputs of every tile of this program."""
    x_ring, x_full, x_empty, words_ring, words_full, words_empty = rings
    N, n_padded, first_step, num_blocks, tiles_m, tiles_n = sizes
    X_STAGES: gl.constexpr = x_ring.type.shape[0]
    WORDS_STAGES: gl.constexpr = words_ring.type.shape[0]
    BLOCK_M: gl.constexpr = x_ring.type.shape[1]
    DTYPE: gl.constexpr = x_ring.dtype
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    first_row: gl.constexpr = PART * _OUTPUTS
    rows = first_row + gl.arange(0, _OUTPUTS, gl.SliceLayout(1, WORDS))
    of_rows = ((rows >> 4 << 3) | (rows & 7)) if PAIRED else rows
    of_tile: gl.constexpr = _BLOCK_N // 2 if PAIRED else _BLOCK_N
    stride = n_padded // 2 if PAIRED else n_padded
    last_block = num_blocks - 1
    x_stage, x_phase = gl.to_tensor(0), gl.to_tensor(0)
    words_stage, words_phase = gl.to_tensor(0), gl.to_tensor(0)
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP)
        ptrs = scales_ptr + tile_n * of_tile + of_rows
        metadata = metadata_at(ptrs, 0, first_step, last_block, stride, STEPS_PER_GROUP)
        mbarrier.wait(words_full.index(words_stage), words_phase)
        words = words_ring.index(words_stage).slice(first_row, _OUTPUTS, dim=0).load(WORDS)
        mbarrier.arrive(words_empty.index(words_stage), count=1)
        words_stage, words_phase = next_stage(words_stage, words_phase, WORDS_STAGES)
        low = decoded(words, metadata, PAIRED, DECODE_LOW, DTYPE, A)
        acc = gl.zeros((_OUTPUTS, BLOCK_M), gl.float32, SUM)
        for block in range(num_blocks):
            # Needed at the end of this block.
            following = metadata_at(
                ptrs, block + 1, first_step, last_block, stride, STEPS_PER_GROUP
            )
            first = x_stage
            mbarrier.wait(x_full.index(first), x_phase)
            acc = warpgroup_mma(low, x_ring.index(first).permute((1, 0)), acc, is_async=True)
            x_stage, x_phase = next_stage(x_stage, x_phase, X_STAGES)
            high = decoded(words, metadata, PAIRED, DECODE_HIGH, DTYPE, A)
            second = x_stage
            mbarrier.wait(x_full.index(second), x_phase)
            acc, low = warpgroup_mma_wait(0, deps=[acc, low])
            acc = warpgroup_mma(high, x_ring.index(second).permute((1, 0)), acc, is_async=True)
            mbarrier.arrive(x_empty.index(first), count=1)
            x_stage, x_phase = next_stage(x_stage, x_phase, X_STAGES)
            if block < last_block:
                mbarrier.wait(words_full.index(words_stage), words_phase)
                words = words_ring.index(words_stage).slice(first_row, _OUTPUTS, dim=0).load(WORDS)
                mbarrier.arrive(words_empty.index(words_stage), count=1)
                words_stage, words_phase = next_stage(words_stage, words_phase, WORDS_STAGES)
            metadata = following
            low = decoded(words, metadata, PAIRED, DECODE_LOW, DTYPE, A)
            acc, high = warpgroup_mma_wait(0, deps=[acc, high])
            mbarrier.arrive(x_empty.index(second), count=1)
        first_output = tile_n * _BLOCK_N + first_row
        if HAS_BIAS:
            outputs = first_output + gl.arange(0, _OUTPUTS, gl.SliceLayout(1, SUM))
            bias = gl.load(bias_ptr + outputs, mask=outputs < N, other=0.0)
            acc += gl.expand_dims(bias.to(gl.float32), 1)
        store(y_desc, y_buffers.index(PART), acc, tile_m * BLOCK_M, first_output)
    tma.store_wait(0)


@gluon.jit
def store(y_desc, buffer, acc, token, output):
    """Through `buffer`, as many tokens at a time as it holds; nothing outside y is written."""
    if acc.shape[1] == buffer.shape[0]:
        # The copy before this one has read the buffer.
        tma.store_wait(0)
        buffer.permute((1, 0)).store(acc.to(buffer.dtype))
        fence_async_shared()
        _async_store(y_desc, [token, output], buffer)
    else:
        HALF: gl.constexpr = acc.shape[1] // 2
        parts = gl.permute(gl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1))
        left, right = gl.split(parts)
        store(y_desc, buffer, left, token, output)
        store(y_desc, buffer, right, token + HALF, output)


@gluon.jit(
    do_not_specialize=["N", "first_step", "num_blocks", "tiles_m", "tiles_n"],
    do_not_specialize_on_alignment=["bias_ptr"],
)
def specialised_kernel(
    x_desc,
    words_desc,
    y_desc,
    scales_ptr,
    bias_ptr,
    N,
    n_padded,
    first_step,
    num_blocks,
    tiles_m,
    tiles_n,
    GROUP: gl.constexpr,
    X_STAGES: gl.constexpr,
    WORDS_STAGES: gl.constexpr,
    STEPS_PER_GROUP: gl.constexpr,
    PAIRED: gl.constexpr,
    DECODE_LOW: gl.constexpr,
    DECODE_HIGH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CONSUMER: gl.constexpr,
    PRODUCER: gl.constexpr,
):
    """All of y, for weights whose blocks of 128 rows of K have one group each.

    `x_desc` describes x in blocks `[tokens, 64]`, `words_desc` the words of P4 as
    `[num_blocks * n_padded, 16]` in blocks of 128 rows, `y_desc` y in blocks `[tokens, 64]`, of
    as many tokens or a half, a quarter and so on. `scales_ptr` as in `layouts/tiled.py`; PAIRED
    where there are no zero points. `first_step` is the phase in blocks, STEPS_PER_GROUP blocks are
    a group, 0 where all of K is one. DECODE_LOW and DECODE_HIGH are `specialised.half_ptx`.
    """
    x_ring = gl.allocate_shared_memory(
        x_desc.dtype, [X_STAGES] + x_desc.block_type.shape, x_desc.layout
    )
    words_ring = gl.allocate_shared_memory(
        words_desc.dtype, [WORDS_STAGES] + words_desc.block_type.shape, words_desc.layout
    )
    y_buffers = gl.allocate_shared_memory(
        y_desc.dtype, [2] + y_desc.block_type.shape, y_desc.layout
    )
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    words_full = gl.allocate_shared_memory(gl.int64, [WORDS_STAGES, 1], mbarrier.MBarrierLayout())
    words_empty = gl.allocate_shared_memory(gl.int64, [WORDS_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=2)
    for i in gl.static_range(WORDS_STAGES):
        mbarrier.init(words_full.index(i), count=1)
        mbarrier.init(words_empty.index(i), count=2)
    fence_async_shared()
    rings = (x_ring, x_full, x_empty, words_ring, words_full, words_empty)
    sizes = (N, n_padded, first_step, num_blocks, tiles_m, tiles_n)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    y_desc,
                    scales_ptr,
                    bias_ptr,
                    y_buffers,
                    rings,
                    sizes,
                    0,
                    GROUP,
                    STEPS_PER_GROUP,
                    PAIRED,
                    DECODE_LOW,
                    DECODE_HIGH,
                    HAS_BIAS,
                ),
            ),
            (
                consume,
                (
                    y_desc,
                    scales_ptr,
                    bias_ptr,
                    y_buffers,
                    rings,
                    sizes,
                    1,
                    GROUP,
                    STEPS_PER_GROUP,
                    PAIRED,
                    DECODE_LOW,
                    DECODE_HIGH,
                    HAS_BIAS,
                ),
            ),
            (produce, (x_desc, words_desc, rings, sizes, GROUP)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )
