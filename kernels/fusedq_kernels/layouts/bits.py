"""Codes into words and back, for whole stripes of rows at a time.

`tiled.py` and `wna16.py` draw the orders implemented here. A 4-bit code of 16 or more
would spill into its neighbour, so `packing.py` checks every stripe with `check_below`.
"""

import torch


def p4_encode(codes: torch.Tensor, words: torch.Tensor) -> None:
    """Write codes `[R, 128 B]` into P4 words, int32 `[B, R, 16]`."""
    planes = codes.view(codes.shape[0], -1, 4, 32)
    low = (planes[:, :, 0] | (planes[:, :, 1] << 4)).to(torch.int16)
    high = (planes[:, :, 2] | (planes[:, :, 3] << 4)).to(torch.int16)
    halves = low.bitwise_or_(high.bitwise_left_shift_(8))
    words.view(torch.int16).copy_(halves.transpose(0, 1))


def p4_decode(words: torch.Tensor) -> torch.Tensor:
    """Codes `[R, 128 B]` of P4 words, int32 `[B, R, 16]`."""
    halves = words.view(torch.int16).transpose(0, 1)
    rows, blocks = halves.shape[:2]
    codes = halves.new_empty((rows, blocks, 4, 32), dtype=torch.uint8)
    for plane, pair in ((0, halves.to(torch.uint8)), (2, (halves >> 8).to(torch.uint8))):
        codes[:, :, plane] = pair & 15
        codes[:, :, plane + 1] = pair >> 4
    return codes.view(rows, -1)


def p8_encode(codes: torch.Tensor, words: torch.Tensor) -> None:
    """Write codes `[R, 128 B]` into P8 words, int32 `[B, R, 32]`."""
    planes = codes.view(codes.shape[0], -1, 2, 64)
    # Little-endian: byte j of a halfword is plane j.
    octets = words.view(torch.uint8).unflatten(-1, (64, 2))
    octets.copy_(planes.permute(1, 0, 3, 2))


def p8_decode(words: torch.Tensor) -> torch.Tensor:
    """Codes `[R, 128 B]` of P8 words, int32 `[B, R, 32]`."""
    octets = words.view(torch.uint8).unflatten(-1, (64, 2))
    return octets.permute(1, 0, 3, 2).reshape(words.shape[1], -1)


def pl4_encode(codes: torch.Tensor, words: torch.Tensor) -> None:
    """Write codes `[R, 128 B]` into PL4 words, int32 `[B, R, 16]`."""
    planes = codes.view(codes.shape[0], -1, 4, 16, 2)
    octets = planes[..., 0] | (planes[..., 1] << 4)
    # Little-endian: byte j of a word is plane j.
    words.view(torch.uint8).unflatten(-1, (16, 4)).copy_(octets.permute(1, 0, 3, 2))


def pl4_decode(words: torch.Tensor) -> torch.Tensor:
    """Codes `[R, 128 B]` of PL4 words, int32 `[B, R, 16]`."""
    octets = words.view(torch.uint8).unflatten(-1, (16, 4)).permute(1, 0, 3, 2)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def wna16_encode(codes: torch.Tensor, words: torch.Tensor) -> None:
    """Write codes `[16 B, K]` into CPU_WNA16 words, int32 `[B, 2 K]`."""
    k = codes.shape[1]
    pairs = codes.view(-1, 8, 2, k)
    octets = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    words.view(torch.uint8).view(-1, k, 8).copy_(octets.transpose(1, 2))


def wna16_decode(words: torch.Tensor) -> torch.Tensor:
    """Codes `[16 B, K]` of CPU_WNA16 words, int32 `[B, 2 K]`."""
    k = words.shape[1] // 2
    octets = words.view(torch.uint8).view(-1, k, 8).transpose(1, 2).contiguous()
    return torch.stack((octets & 15, octets >> 4), dim=2).view(-1, k)


def nibbles_encode(values: torch.Tensor) -> torch.Tensor:
    """Words int32 `[..., W]` whose nibble i of word w is value `8 w + i` of uint8 `[..., 8 W]`."""
    return (values[..., 0::2] | (values[..., 1::2] << 4)).view(torch.int32)


def nibbles_decode(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `nibbles_encode`."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def check_below(tensor: torch.Tensor, bound: int, name: str) -> None:
    """Raise ValueError unless every uint8 value is below `bound`; meta tensors pass."""
    if bound > 255 or tensor.is_meta or not tensor.numel():
        return
    if (found := int(tensor.max())) >= bound:
        raise ValueError(f"{name} of this layout must be below {bound}, got {found}")


def padded(
    codes: torch.Tensor,
    rows: int,
    pad: int,
    k_padded: int,
    front: int | torch.Tensor,
    back: int | torch.Tensor,
) -> torch.Tensor:
    """Codes `[N, K]` at `[:N, pad : pad + K]` of `[rows, k_padded]`; no copy where they fit."""
    count, k = codes.shape
    if (rows, k_padded) == (count, k):
        return codes.contiguous()
    wide = codes.new_zeros((rows, k_padded))
    wide[:count, :pad] = front
    wide[:count, pad : pad + k] = codes
    wide[:count, pad + k :] = back
    return wide
