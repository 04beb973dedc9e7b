"""What the compiler makes of each experiment's variants, before a GPU's first minute is spent.

    python benchmarks/compile_experiments.py 1 2 4 9

Needs no GPU. A line per variant with a tile of its own, as int4 in groups of 128 and bf16 for
sm_90; the exit status is 1 if one spills registers.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from fusedq_kernels.audit import fused
from fusedq_kernels.types import QuantSpec, WeightType
from gemmbench.experiments import EXPERIMENTS
from gemmbench.variants import Variant, decoding, describe

TARGET = "sm_90"

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(number: Annotated[list[int], typer.Argument(help="of the experiments")]) -> None:
    spilled = False
    for each in number:
        variants = [v for v in EXPERIMENTS[each].variants if isinstance(v, Variant)]
        for line in compiled_rows(variants):
            print(line, flush=True)
            spilled |= "spills" in line
    raise typer.Exit(spilled)


def compiled_rows(variants: list[Variant]) -> Iterator[str]:
    """A printed line per variant with a tile of its own."""
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
    for variant in (each for each in variants if each.tile is not None):
        with decoding(dict(variant.decoders)):
            row = fused.audit_tile(TARGET, variant.tile, spec, torch.bfloat16)
        problems = ", ".join(row.problems) or "fine"
        yield (
            f"{variant.name}: {describe(variant.tile)}: {row.registers} registers, "
            f"{row.instructions_per_weight:.2f} instructions per weight, {row.smem} bytes of "
            f"shared memory, {row.mma}: {problems}"
        )


if __name__ == "__main__":
    app()
