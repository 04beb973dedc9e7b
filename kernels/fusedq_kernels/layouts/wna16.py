"""Layout CPU_WNA16, which vLLM's CPU operator `cpu_gemm_wna16` reads.

qweight, int32 `[n_padded // 16, 2 k_padded]`, n_padded a multiple of 32: nibble i of word
`[nb, 2 k + h]` holds the code of output `16 nb + 8 h + i`.

scales, `[G, n_padded]` in the activation dtype; zeros, for uint4 only, int32 `[G, n_padded // 8]`:
nibble i of word `[g, w]` is the zero point of output `8 w + i`.

`packing.py` is the public side; `bits.py` moves the nibbles.
"""

import torch

from fusedq_kernels.geometry import count_groups, round_up, wna16_geometry
from fusedq_kernels.layouts import bits
from fusedq_kernels.layouts.resident import WNA16_BLOCK_N
from fusedq_kernels.types import PackedWeight


def write_groups(
    packed: PackedWeight, start: int, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """Write the scales and zero points of outputs from `start` on."""
    count, num_groups = scales.shape
    packed.scales[:num_groups, start : start + count] = scales.t()
    if zeros is None or packed.zeros is None:
        return
    bits.check_below(zeros, 16, "zeros")
    values = zeros.new_zeros((num_groups, round_up(count, WNA16_BLOCK_N)))
    values[:, :count] = zeros.t()
    words = bits.nibbles_encode(values)
    packed.zeros[:num_groups, start // 8 : start // 8 + words.shape[1]] = words


def read_groups(
    packed: PackedWeight, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points `[stop - start, G]` of outputs `[start, stop)`."""
    num_groups = count_groups(packed.k, packed.spec.group_size, packed.phase)
    scales = packed.scales[:num_groups, start:stop].t().contiguous()
    if packed.zeros is None:
        return scales, None
    zeros = bits.nibbles_decode(packed.zeros[:num_groups])
    return scales, zeros[:, start:stop].t().contiguous()


def write_codes(
    packed: PackedWeight, start: int, codes: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """Write the codes `[rows, K]` of outputs from `start` on."""
    count, k = codes.shape
    geometry = wna16_geometry(k, packed.spec.group_size, packed.phase)
    # A padding code equals its zero point, so that it is worth nothing whatever x holds there.
    front, back = (8, 8) if zeros is None else (zeros[:, :1], zeros[:, -1:])
    rows = round_up(count, WNA16_BLOCK_N)
    padded = bits.padded(codes, rows, geometry.pad, geometry.k_padded, front, back)
    first = start // WNA16_BLOCK_N
    bits.wna16_encode(padded, packed.qweight[first : first + rows // WNA16_BLOCK_N])


def read_codes(packed: PackedWeight, start: int, stop: int) -> torch.Tensor:
    """Codes uint8 `[stop - start, K]` of outputs `[start, stop)`."""
    pad = wna16_geometry(packed.k, packed.spec.group_size, packed.phase).pad
    first, last = start // WNA16_BLOCK_N, -(-stop // WNA16_BLOCK_N)
    codes = bits.wna16_decode(packed.qweight[first:last])
    return codes[: stop - start, pad : pad + packed.k]


def gather(
    packed: PackedWeight, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of outputs `rows`, int64 `[M]`."""
    geometry = wna16_geometry(packed.k, packed.spec.group_size, packed.phase)
    block, place = rows // WNA16_BLOCK_N, rows % WNA16_BLOCK_N
    # Little-endian: 8 bytes hold the nibbles of 16 outputs
    octets = packed.qweight.view(torch.uint8).view(-1, geometry.k_padded, WNA16_BLOCK_N // 2)
    codes = octets[block, :, place // 2] >> (place % 2 * 4).byte()[:, None]
    codes = codes[:, geometry.pad : geometry.pad + packed.k] & 15
    num_groups = count_groups(packed.k, packed.spec.group_size, packed.phase)
    scales = packed.scales[:num_groups].index_select(1, rows).t()
    if packed.zeros is None:
        return codes, scales, None
    words = packed.zeros[:num_groups].index_select(1, rows // 8)
    zeros = (words >> (rows % 8 * 4).int()) & 15
    return codes, scales, zeros.byte().t()
