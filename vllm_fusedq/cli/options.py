"""Options that several commands have, and what follows from them."""

from enum import StrEnum
from typing import Annotated

import typer

KernelOption = Annotated[
    str, typer.Option(help='a kernel to insist on, as in additional-config "fusedq"')
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one")]
ActDtypeOption = Annotated[str, typer.Option(help="activation dtype: bfloat16 or float16")]
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


class Dtype(StrEnum):
    """Activation dtypes; `auto` is the checkpoint's, as in vLLM."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


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


def settings_section(kernel: str, activations: Activations, experimental: bool) -> dict[str, str]:
    """What these options say, as additional-config "fusedq" has it."""
    section = {"kernel": kernel, "activations": activations.value}
    return section | ({"device": "experimental"} if experimental else {})


def check_act_dtype(dtype: str) -> None:
    """Raises typer.BadParameter for what is no dtype of activations."""
    if dtype not in ("bfloat16", "float16"):
        raise typer.BadParameter(f"dtype {dtype!r}; choose bfloat16 or float16")


def this_device(device: str) -> str:
    """The option as PyTorch names it, "cpu" or "cuda"; raises typer.BadParameter."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"device {device!r}; choose auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise typer.BadParameter("device 'cuda': torch finds no GPU; choose auto or cpu")
    return "cuda" if has_gpu and device != "cpu" else "cpu"
