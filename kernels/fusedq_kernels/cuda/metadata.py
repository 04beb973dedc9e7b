"""Scales and zero points inside the kernels: which group, which word, which half of it.

A kernel loads whole words: `resident.scale_words` says how many rows of N share one (PAIRED: two)
and how many groups lie side by side (VECTOR). Scales of rows lie behind, in TAIL vectors. What a
decoder gets is the metadata of one group, 4
bytes a row: an fp32 scale, or a 16-bit scale in the upper half and a zero point, if any, in the
lower one.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

import triton
import triton.language as tl


@triton.jit
def vector_of(
    block,
    sub,
    first_step,
    last_group,
    STEPS: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The vector that holds the group of step `sub` of a K block, as its element `sub % VECTOR`.

    `first_step` is the phase in steps. With one group over all of K, STEPS_PER_GROUP is 0.
    """
    if STEPS_PER_GROUP == 0:
        return block * 0
    elif VECTOR > 1:
        # One group a step, none cut by the start of a block, and whole blocks of them.
        return block * (STEPS // VECTOR) + sub // VECTOR
    else:
        group = (block * STEPS + sub + first_step) // STEPS_PER_GROUP
        if STEPS > 1:
            # Steps made of padding alone may lie beyond the last group.
            group = tl.minimum(group, last_group)
        return group


@triton.jit
def num_vectors(
    num_blocks,
    last_group,
    STEPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """How many vectors of groups a weight has: `resident.scale_words(..).vectors`."""
    if VECTOR > 1:
        return num_blocks * (STEPS // VECTOR)
    else:
        return last_group + 1


@triton.jit
def row_scales(
    scales_ptr, vectors, rows, n_padded, mask, VECTOR: tl.constexpr, PAIRED: tl.constexpr
):
    """The fp32 scales of `rows` themselves, which lie behind `vectors` vectors of their groups'."""
    words = vectors.to(tl.int64) * (n_padded // 2 if PAIRED else n_padded) * VECTOR + rows
    return tl.load(scales_ptr + words, mask=mask, other=0).to(tl.float32, bitcast=True)


@triton.jit
def word_of(rows, PAIRED: tl.constexpr):
    """Which word of a group holds the metadata of each row."""
    if PAIRED:
        return (rows >> 4 << 3) | (rows & 7)
    else:
        return rows


@triton.jit
def of_row(words, rows, PAIRED: tl.constexpr):
    """Metadata of `rows` from the words that hold them."""
    if PAIRED:
        return words << (16 - ((rows & 8) << 1)).to(tl.int32)
    else:
        return words


@triton.jit
def row_metadata(
    scales_ptr,
    vector,
    rows,
    n_padded,
    mask,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Metadata of any `rows` for element INDEX of a vector; masked rows get zero."""
    words = vector.to(tl.int64) * (n_padded // 2 if PAIRED else n_padded) + word_of(rows, PAIRED)
    words = tl.load(scales_ptr + words * VECTOR + INDEX, mask=mask, other=0)
    return of_row(words, rows, PAIRED)


@triton.jit
def vector_ptrs(
    scales_ptr,
    first_row,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    OWN_ROW: tl.constexpr,
):
    """Where the first vector of a tile's words lies: `[words]`, or `[words, VECTOR]`.

    With OWN_ROW there are as many words as rows, for `tile_metadata`.
    """
    if PAIRED and not OWN_ROW:
        words = first_row // 2 + tl.arange(0, BLOCK_N // 2)
    else:
        words = word_of(first_row + tl.arange(0, BLOCK_N), PAIRED)
    if VECTOR == 1:
        return scales_ptr + words
    else:
        return scales_ptr + words[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def tile_metadata(
    vectors,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    OWN_ROW: tl.constexpr,
):
    """Metadata `[BLOCK_N]` of element INDEX of the vectors that `vector_ptrs` points to.

    The sums of mma and wgmma lie so that rows r and r + 8 of 16 belong to one thread: it reads a
    word for both. Those of tcgen05 come one row to a thread, which reads that row's word: OWN_ROW.
    """
    words = _element(vectors, INDEX, VECTOR)
    if PAIRED and not OWN_ROW:
        # Only renames registers.
        rows = tl.reshape(tl.join(words << 16, words), (BLOCK_N // 16, 8, 2))
        return tl.reshape(tl.permute(rows, (0, 2, 1)), (BLOCK_N,))
    else:
        return of_row(words, tl.arange(0, BLOCK_N), PAIRED)


@triton.jit
def _element(vectors, INDEX: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR == 1:
        return vectors
    elif VECTOR == 2:
        even, odd = tl.split(vectors)
        return even if INDEX == 0 else odd
    else:
        even, odd = tl.split(tl.reshape(vectors, (vectors.shape[0], 2, 2)))
        return _element(even if INDEX % 2 == 0 else odd, INDEX // 2, 2)


@triton.jit
def stored_scale(metadata, SCALE_DTYPE: tl.constexpr):
    """Scales as they are stored, SCALE_DTYPE of the shape of `metadata`."""
    if SCALE_DTYPE == tl.float32:
        return metadata
    else:
        return (metadata >> 16).to(tl.int16).to(SCALE_DTYPE, bitcast=True)


@triton.jit
def scale_of(metadata, SCALE_DTYPE: tl.constexpr):
    """Scales in fp32."""
    if SCALE_DTYPE == tl.bfloat16:
        # An fp32 without the lower half of its mantissa.
        return (metadata & -65536).to(tl.float32, bitcast=True)
    else:
        return stored_scale(metadata, SCALE_DTYPE).to(tl.float32)
