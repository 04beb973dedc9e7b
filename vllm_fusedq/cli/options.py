"""Options that several commands have."""

from enum import StrEnum
from typing import Annotated

import typer

ExperimentalOption = Annotated[
    bool,
    typer.Option(
        "--experimental-device", help="also on AMD's GPUs, where nothing of this was ever run"
    ),
]


TensorParallelSizes = Annotated[
    str,
    typer.Option("--tensor-parallel-size", "-tp", help="one size, or several: 1,2,4,8"),
]


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


def device_setting(experimental: bool) -> dict[str, str]:
    """What the option says, as settings have it."""
    return {"device": "experimental"} if experimental else {}
