"""What a format supports, in the words of the README's table (`scripts/support_table.py`)."""

from collections.abc import Sequence
from typing import NamedTuple


class Support(NamedTuple):
    """A row of the table. A format makes its rows from the constants that it checks with."""

    checkpoint: str
    weights: str
    zero_points: str
    groups: str = "multiples of 8, per channel"


def bit_widths(bits: Sequence[int]) -> str:
    """`2 to 8 bits` or `2, 3, 4, 8 bits`."""
    run = list(range(bits[0], bits[-1] + 1))
    if list(bits) == run and len(run) > 2:
        return f"{bits[0]} to {bits[-1]} bits"
    return f"{', '.join(map(str, bits))} bits"
