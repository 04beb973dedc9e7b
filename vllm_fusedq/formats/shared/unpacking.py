"""Unpacks integer words of 2- to 8-bit codes into uint8 codes.

Code i of a word is its bits `[bits * i, bits * (i + 1))`. Widths that divide no word are stored in
two ways: `32 // bits` whole codes per word with the highest bits unused, or straddling, as one
stream of bits in which 32 codes take `bits` words. 4 and 8 bits work on bytes (little-endian, like
every platform torch runs on) because wider intermediates cost up to 8 times the memory traffic of
the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from fusedq_kernels.lazy import torch

NIBBLES = 8
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_columns(
    words: torch.Tensor, bits: int = 4, straddling: bool = False, high_first: bool = False
) -> torch.Tensor:
    """int32 `[R, W]`, column `P * w + i` in code i -> contiguous uint8 `[R, P * W]`.

    P is `32 // bits`; of straddling words, `bits` hold 32 columns and the last may be missing.
    4-bit words of another integer dtype hold two codes per byte in the same way; with `high_first`
    the first of each byte is its high nibble.
    """
    rows, width = words.shape
    if bits == 8:
        return _bytes(words).view(rows, 4 * width)
    if straddling or bits == 2:
        return _spread(words, bits)
    if bits != 4:
        return _fields(words, bits)
    nibbles = 2 * words.dtype.itemsize
    pairs = _bytes(words).to(torch.int16)
    # One byte to two: 0x00BA becomes 0x0B0A, whose bytes are the low nibble, then the high one
    spread = (pairs << 8).bitwise_or_(pairs >> 4) if high_first else pairs.bitwise_or_(pairs << 4)
    return spread.bitwise_and_(0x0F0F).view(torch.uint8).view(rows, nibbles * width)


def unpack_rows(
    words: torch.Tensor, bits: int = 4, order: Sequence[int] = IN_ORDER
) -> torch.Tensor:
    """int32 `[W, C]`, each column one stream of bits -> contiguous uint8 `[32 * W / bits, C]`.

    Row `8 * i + order[j]` is code j of the i-th 8, which take `bits` bytes; where the last of them
    are missing, rows of zeros are added.
    """
    if missing := -len(words) % (bits // gcd(bits, words.itemsize)):
        words = torch.nn.functional.pad(words, (0, 0, 0, missing))
    height, width = words.shape
    # Contiguous byte planes: reading every fourth byte does not vectorise
    planes = _bytes(words).view(height, width, 4).permute(0, 2, 1).contiguous()
    planes = planes.view(4 * height // bits, bits, width)
    codes = torch.empty(len(planes), NIBBLES, width, dtype=torch.uint8, device=words.device)
    for index, place in enumerate(order):
        byte, low = divmod(bits * index, 8)
        code = torch.bitwise_right_shift(planes[:, byte], low, out=codes[:, place])
        if low + bits > 8:
            code |= planes[:, byte + 1] << (8 - low)
        if low + bits != 8:
            code &= (1 << bits) - 1
    return codes.view(-1, width)


def take(
    codes: torch.Tensor, dim: int, start: int, length: int, block: int = NIBBLES
) -> torch.Tensor:
    """Cut whole words or blocks down to `length` logical indices, from logical index `start` on."""
    return codes.narrow(dim, start % block, length).contiguous()


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[R, P * W]`, the P whole codes of each word."""
    count, mask = 32 // bits, (1 << bits) - 1
    codes = torch.empty(*words.shape, count, dtype=torch.uint8, device=words.device)
    for index in range(count):
        codes[..., index] = (words >> (bits * index)) & mask
    return codes.view(len(words), -1)


def _spread(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[R, 32 * W / bits]` of int32 `[R, W]`, each row one stream of bits.

    8 codes are `bits` bytes: they are halved three times, each half to a place of its own, until
    every code has a byte of an int64.
    """
    if missing := -words.shape[1] % bits:
        words = torch.nn.functional.pad(words, (0, missing))
    octets = _bytes(words).view(-1, bits)
    codes = octets[:, 0].to(torch.int64)
    for index in range(1, bits):
        codes |= octets[:, index].to(torch.int64) << (8 * index)
    for width, place in ((4 * bits, 32), (2 * bits, 16), (bits, 8)):
        low, high = (
            sum(((1 << width) - 1) << start for start in range(first, 64, 2 * place))
            for first in (0, place)
        )
        upper = (codes << (place - width)).bitwise_and_(high)
        codes.bitwise_and_(low).bitwise_or_(upper)
    return codes.view(torch.uint8).view(len(words), -1)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """The bytes of a matrix in row-major order, flat."""
    if words.stride(1) != 1:
        # torch transposes a dense matrix about five times faster than a strided one
        words = words.T.contiguous().T
    # A dimension of size 1 may keep any stride, which a view as bytes refuses
    return words.contiguous().as_strided((words.numel(),), (1,)).view(torch.uint8)
