"""The tiled layouts P4, P8 and PL4, which the Triton and the striped CPU kernel read.

All are int32 `[k_padded // 128, n_padded, words]`, n_padded a multiple of 128, and keep pairs of
neighbouring rows in the 16-bit halves of a word, so that one word expands to whole pairs of 16-bit
values.

P4, 16 words: bits `4j + 16b .. 4j + 16b + 3` of word `[kb, n, w]` hold the code of padded row
`128 kb + 32 j + 2 w + b` (j < 4, b < 2). As int16, halfword h of a row holds rows h, h + 32,
h + 64, h + 96.

P8, 32 words: bits `8j + 16b .. 8j + 16b + 7` of word `[kb, n, w]` hold the code of padded row
`128 kb + 64 j + 2 w + b` (j < 2, b < 2). As int16, halfword h of a row holds rows h and h + 64.

PL4, 16 words: bits `8j + 4b .. 8j + 4b + 3` of word `[kb, n, w]` hold the code of padded row
`128 kb + 32 j + 2 w + b` (j < 4, b < 2): pairs are adjacent, so that a byte permute on two bytes
yields whole pairs of values.

scales, `[G, n_padded]`: fp32 without stored zero points; with them int32
`(16-bit scale << 16) | zero point`, because a 16-bit scale alone is a load that the compiler does
not pipeline.

`packing.py` is the public side; `bits.py` moves the codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.layouts import bits
from fusedq_kernels.types import Layout, PackedWeight


@dataclass(frozen=True, slots=True)
class TiledCodec:
    """The two functions that fill the words of one tiled layout.

    Zero points are below `zero_bound`.
    """

    layout: Layout
    zero_bound: int
    encode: Callable[[torch.Tensor, torch.Tensor], None]
    decode: Callable[[torch.Tensor], torch.Tensor]

    def write_groups(
        self, packed: PackedWeight, start: int, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> None:
        """Write the scales and zero points of outputs from `start` on."""
        target = packed.scales[:, start : start + scales.shape[0]]
        if zeros is None:
            target.copy_(scales.t())
            return
        bits.check_below(zeros, self.zero_bound, "zeros")
        target.copy_(scales.contiguous().view(torch.int16).t())
        target.bitwise_left_shift_(16).bitwise_or_(zeros.t())

    def read_groups(
        self, packed: PackedWeight, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points `[stop - start, G]` of outputs `[start, stop)`."""
        groups = packed.scales[:, start:stop].t().contiguous()
        if not packed.spec.has_zero_points:
            return groups.to(packed.spec.scale_dtype.torch), None
        scales = (groups >> 16).to(torch.int16).view(packed.spec.scale_dtype.torch)
        return scales, groups.to(torch.uint8)

    def write_codes(
        self, packed: PackedWeight, start: int, codes: torch.Tensor, zeros: torch.Tensor | None
    ) -> None:
        """Write the codes `[rows, K]` of outputs from `start` on."""
        count, k = codes.shape
        geometry = group_geometry(k, packed.spec.group_size, packed.phase)
        padded = bits.padded(codes, count, geometry.pad, geometry.k_padded, 0, 0)
        self.encode(padded, packed.qweight[:, start : start + count])

    def read_codes(self, packed: PackedWeight, start: int, stop: int) -> torch.Tensor:
        """Codes uint8 `[stop - start, K]` of outputs `[start, stop)`."""
        pad = group_geometry(packed.k, packed.spec.group_size, packed.phase).pad
        return self.padded_codes(packed, start, stop)[:, pad : pad + packed.k]

    def gather(
        self, packed: PackedWeight, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scales and zero points of outputs `rows`, int64 `[M]`."""
        qweight, scales = (each.index_select(1, rows) for each in (packed.qweight, packed.scales))
        few = replace(packed, qweight=qweight, scales=scales, n=len(rows))
        return self.read_codes(few, 0, few.n), *self.read_groups(few, 0, few.n)

    def padded_codes(self, packed: PackedWeight, start: int, stop: int) -> torch.Tensor:
        """Codes uint8 `[stop - start, k_padded]` of outputs `[start, stop)`."""
        return self.decode(packed.qweight[:, start:stop])


TILED = {
    codec.layout: codec
    for codec in (
        # A stored GPTQ v1 zero point of 15 means 16, and the kernels are exact up to it.
        TiledCodec(Layout.P4, 17, bits.p4_encode, bits.p4_decode),
        TiledCodec(Layout.P8, 256, bits.p8_encode, bits.p8_decode),
        TiledCodec(Layout.PL4, 0, bits.pl4_encode, bits.pl4_decode),
    )
}
