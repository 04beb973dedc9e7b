"""Options that several commands have."""

from enum import StrEnum
from typing import Annotated

import typer


class Activations(StrEnum):
    """As the setting of this name."""

    AUTO = "auto"
    SIXTEEN_BIT = "16-bit"

    @property
    def kept(self) -> bool:
        return self is Activations.SIXTEEN_BIT


ActivationsOption = Annotated[
    Activations,
    typer.Option(
        "--activations",
        help="16-bit: only the weights of a checkpoint that quantizes activations too",
    ),
]
