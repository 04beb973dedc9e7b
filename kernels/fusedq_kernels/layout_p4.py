"""Layout P4, which the Triton kernel and the striped CPU kernel read.

qweight, int32 `[k_padded // 128, n_padded, 16]`, n_padded a multiple of 128: bits
`4j + 16b .. 4j + 16b + 3` of word `[kb, n, w]` hold the code of padded row
`128 kb + 32 j + 2 w + b` (j < 4, b < 2, w < 16). One word expands to whole pairs of 16-bit values,
and as int16 halfword h of a row holds rows h, h + 32, h + 64, h + 96.

scales, `[G, n_padded]`: fp32 for uint4b8; for uint4 int32 `(16-bit scale << 16) | zero point`,
because a 16-bit scale alone is a load that the compiler does not pipeline.

`layout.py` is the public side; `bits.py` moves the nibbles.
"""

import torch

from fusedq_kernels import bits
from fusedq_kernels.geometry import P4_BLOCK_K, TensorSpec, group_geometry, round_up
from fusedq_kernels.types import PackedWeight, QuantSpec

BLOCK_N = 128


def shapes(
    n: int, k: int, spec: QuantSpec, phase: int, act_dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Shape and dtype of each resident tensor."""
    if spec.has_zero_points and spec.scale_dtype.itemsize != 2:
        raise ValueError(
            f"layout P4 keeps a 16-bit scale beside each zero point, got {spec.scale_dtype}"
        )
    geometry = group_geometry(k, spec.group_size, phase)
    n_padded = round_up(n, BLOCK_N)
    scale_dtype = torch.int32 if spec.has_zero_points else torch.float32
    return {
        "qweight": TensorSpec((geometry.k_padded // P4_BLOCK_K, n_padded, 16), torch.int32),
        "scales": TensorSpec((geometry.num_groups, n_padded), scale_dtype),
    }


def write_groups(
    packed: PackedWeight, start: int, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """Write the scales and zero points of outputs from `start` on."""
    target = packed.scales[:, start : start + scales.shape[0]]
    if zeros is None:
        target.copy_(scales.t())
        return
    # A stored GPTQ v1 zero point of 15 means 16, and the kernels are exact up to it.
    bits.check_below(zeros, 17, "zeros")
    target.copy_(scales.contiguous().view(torch.int16).t())
    target.bitwise_left_shift_(16).bitwise_or_(zeros.t())


def read_groups(
    packed: PackedWeight, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points of outputs `[start, stop)` of a P4 weight, `[stop - start, G]`."""
    groups = packed.scales[:, start:stop].t().contiguous()
    if not packed.spec.has_zero_points:
        return groups.to(packed.spec.scale_dtype), None
    scales = (groups >> 16).to(torch.int16).view(packed.spec.scale_dtype)
    return scales, groups.to(torch.uint8)


def write_codes(
    packed: PackedWeight, start: int, codes: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """Write the codes `[rows, K]` of outputs from `start` on."""
    count, k = codes.shape
    geometry = group_geometry(k, packed.spec.group_size, packed.phase)
    padded = bits.padded(codes, count, geometry.pad, geometry.k_padded, 0, 0)
    bits.p4_encode(padded, packed.qweight[:, start : start + count])


def read_codes(packed: PackedWeight, start: int, stop: int) -> torch.Tensor:
    """Codes uint8 `[stop - start, K]` of outputs `[start, stop)`."""
    pad = group_geometry(packed.k, packed.spec.group_size, packed.phase).pad
    return padded_codes(packed, start, stop)[:, pad : pad + packed.k]


def padded_codes(packed: PackedWeight, start: int, stop: int) -> torch.Tensor:
    """Codes of outputs `[start, stop)` of a P4 weight, uint8 `[stop - start, k_padded]`."""
    return bits.p4_decode(packed.qweight[:, start:stop])
