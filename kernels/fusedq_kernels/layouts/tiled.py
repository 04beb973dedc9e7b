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

scales, `[vectors + tail, n_padded // rows, vector]` (`resident.scale_words`), words of 32 bits
because the compiler does not pipeline a narrower load. Group g of row n is in vector `g // vector`,
element `g % vector`:
  - with stored zero points int32, rows 1: `(16-bit scale << 16) | zero point`;
  - 16-bit scales without: int32, rows 2: word `8u + j` holds rows `16u + j` and, in its upper half,
    `16u + j + 8`, the two rows of 16 that a thread of a tensor core holds;
  - 8-bit scales: like 16-bit ones, as bf16, which holds them exactly;
  - 32-bit scales: fp32, rows 1.
Where rows have scales of their own, the first n_padded words of the tail are those, fp32.

`packing.py` is the public side; `bits.py` moves the codes, `scales.py` the scales.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.layouts import bits
from fusedq_kernels.layouts import scales as scale_rows
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
        if zeros is not None:
            bits.check_below(zeros, self.zero_bound, "zeros")
        scale_rows.write(packed, start, scales, zeros)

    def read_groups(
        self, packed: PackedWeight, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points `[stop - start, G]` of outputs `[start, stop)`."""
        return scale_rows.read(packed, start, stop)

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
        few = replace(packed, qweight=packed.qweight.index_select(1, rows), n=len(rows))
        return self.read_codes(few, 0, few.n), *scale_rows.gather(packed, rows)

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
