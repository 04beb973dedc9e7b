"""The first kernels on this GPU: right, and soon. What takes longer is not worth starting else.

    python benchmarks/gate.py
    python benchmarks/gate.py --dry-run     # no GPU: tiny, in the interpreter

The kernel that the rules choose, for four weight types and 1 to 512 tokens, against float64 on all
outputs. The exit status is 1 if one is wrong, does not compile or launch, or if the first is not
there within `--within` seconds of the start.
"""

# The clock starts before torch is imported, which is part of what is waited for.
# ruff: noqa: E402

import os
import time
from importlib.metadata import version
from typing import Annotated

START = time.monotonic()

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusedq_kernels.types import WeightType
from gemmbench import exactness
from gemmbench.results import device_name
from gemmbench.weights import default_spec

WEIGHT_TYPES = (WeightType.UINT4B8, WeightType.UINT4, WeightType.UINT8B128, WeightType.NF4)
SHAPE, TOKENS = (1024, 4096), (1, 16, 64, 512)
DRY_SHAPE, DRY_TOKENS = (72, 272), (1, 17)

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    within: Annotated[float, typer.Option(help="seconds to the first right answer")] = 45,
    dry_run: Annotated[bool, typer.Option(help="tiny, in the interpreter")] = False,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run checks in the interpreter")
    print(f"{device_name(device)}, torch {torch.__version__}, triton {version('triton')}")
    (n, k), tokens = (DRY_SHAPE, DRY_TOKENS) if dry_run else (SHAPE, TOKENS)
    failed = False
    for number, weight_type in enumerate(WEIGHT_TYPES):
        spec = default_spec(weight_type, None, k, torch.bfloat16)
        subject = exactness.Subject(exactness.Case(n, k, spec, torch.bfloat16), device)
        for m in tokens:
            found, right = checked(subject, m)
            failed |= not right
            seconds = time.monotonic() - START
            print(f"{seconds:5.1f} s {weight_type.value}: {found}", flush=True)
            if number == 0 and m == tokens[0] and seconds > within:
                print(f"SLOW: the first kernel took {seconds:.0f} s, at most {within:.0f} allowed")
                raise typer.Exit(1)
    raise typer.Exit(failed)


def checked(subject: exactness.Subject, m: int) -> tuple[str, bool]:
    """What the selected launch for `m` tokens did, and whether it is right."""
    try:
        return exactness.check_right(subject, m, False), True
    except AssertionError as error:
        return f"WRONG {error}", False
    except Exception as error:
        return f"FAILED M={m}: {type(error).__name__}: {error}"[:300], False


if __name__ == "__main__":
    app()
