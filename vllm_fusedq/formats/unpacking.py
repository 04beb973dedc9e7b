"""Unpacks integer words of 4-bit codes into uint8 codes.

Nibble i is bits `[4 * i, 4 * i + 4)` of a word. Works on bytes (little-endian, like every platform
torch runs on) because wider intermediates cost up to 8 times the memory traffic of the codes.
"""

from collections.abc import Sequence

import torch

NIBBLES = 8
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 `[R, W]`, column `8 * w + i` in nibble i -> contiguous uint8 `[R, 8 * W]`.

    Words of another integer dtype hold two codes per byte in the same way.
    """
    rows, width = words.shape
    nibbles = 2 * words.dtype.itemsize
    pairs = _bytes(words).to(torch.int16)
    # One byte to two: 0x00BA becomes 0x0B0A, whose bytes are the low nibble, then the high one
    return (
        pairs.bitwise_or_(pairs << 4)
        .bitwise_and_(0x0F0F)
        .view(torch.uint8)
        .view(rows, nibbles * width)
    )


def unpack_rows(words: torch.Tensor, order: Sequence[int] = IN_ORDER) -> torch.Tensor:
    """int32 `[W, C]`, row `8 * w + order[i]` in nibble i -> contiguous uint8 `[8 * W, C]`."""
    height, width = words.shape
    # Contiguous byte planes: reading every fourth byte does not vectorise
    planes = _bytes(words).view(height, width, 4).permute(0, 2, 1).contiguous()
    codes = torch.empty(height, NIBBLES, width, dtype=torch.uint8, device=words.device)
    for byte in range(4):
        torch.bitwise_and(planes[:, byte], 15, out=codes[:, order[2 * byte]])
        torch.bitwise_right_shift(planes[:, byte], 4, out=codes[:, order[2 * byte + 1]])
    return codes.view(NIBBLES * height, width)


def take(
    codes: torch.Tensor, dim: int, start: int, length: int, block: int = NIBBLES
) -> torch.Tensor:
    """Cut whole words or blocks down to `length` logical indices, from logical index `start` on."""
    return codes.narrow(dim, start % block, length).contiguous()


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """The bytes of a matrix in row-major order, flat."""
    if words.stride(1) != 1:
        # torch transposes a dense matrix about five times faster than a strided one
        words = words.T.contiguous().T
    # A dimension of size 1 may keep any stride, which a view as bytes refuses
    return words.contiguous().as_strided((words.numel(),), (1,)).view(torch.uint8)
