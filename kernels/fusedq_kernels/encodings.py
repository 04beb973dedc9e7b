"""What the codes of a weight mean: integers less a zero point, or the entries of a codebook.

`types.WeightType` names the encodings there are.
"""

from dataclasses import dataclass
from enum import Enum


class ZeroPoint(Enum):
    """Where the zero point of integer codes is, if it is no constant of the type."""

    STORED = "stored"  # one for each group, beside its scale


STORED = ZeroPoint.STORED


@dataclass(frozen=True, slots=True)
class Codes:
    """Unsigned integers of `bits` bits, each worth itself less `zero`."""

    bits: int
    zero: int | ZeroPoint


@dataclass(frozen=True, slots=True)
class Codebook:
    """Codes of `bits` bits that number `values`."""

    bits: int
    values: tuple[float, ...]


# bitsandbytes `functional.get_4bit_type`. It divides its fp4 table by 12; here the scale is to be
# divided, so that every entry is exact in 16 bits.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4_VALUES = (
    *(0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0),
    *(0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0),
)
