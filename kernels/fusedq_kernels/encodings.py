"""What the codes of a weight mean: integers less a zero point, entries of a codebook, or floats.

`types.WeightType` names the encodings there are.
"""

import functools
import math
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


@dataclass(frozen=True, slots=True)
class Floats:
    """Floats of a sign, `exponent` and `mantissa` bits, subnormal ones below, without infinities.

    With `nan` the two codes of nothing but ones (beside the sign) are no numbers: "fn" in the names
    of OCP's 8-bit formats.
    """

    exponent: int
    mantissa: int
    nan: bool

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def values(self) -> tuple[float, ...]:
        """The number that each code is."""
        return _values_of(self)


@functools.cache
def _values_of(floats: Floats) -> tuple[float, ...]:
    lowest = 2 - (1 << (floats.exponent - 1)) - floats.mantissa
    sizes = []
    for code in range(1 << (floats.bits - 1)):
        exponent, mantissa = divmod(code, 1 << floats.mantissa)
        whole = mantissa + (1 << floats.mantissa if exponent else 0)
        sizes.append(math.ldexp(whole, max(exponent, 1) - 1 + lowest))
    if floats.nan:
        sizes[-1] = math.nan
    return (*sizes, *(-size for size in sizes))


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
