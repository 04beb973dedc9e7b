"""What the compiler makes of each experiment's variants, before a GPU's first minute is spent.

    python benchmarks/compile_experiments.py 1 2 4 9
    python benchmarks/compile_experiments.py 9 --csv benchmarks/results/static/prefill-tiles.csv

Needs no GPU. A line per variant with a tile or a decoder of its own, as int4 in groups of 128 and
bf16 for sm_90; the exit status is 1 if one spills registers. `programs` is how many fit an SM by
registers and shared memory.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import triton
import typer

from fusedq_kernels.audit import fused
from fusedq_kernels.audit.rows import WARP_SIZE, AuditRow
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.geometry import round_up
from fusedq_kernels.types import GemmShape, QuantSpec, WeightType
from gemmbench.experiments import EXPERIMENTS
from gemmbench.variants import Variant, describe
from vllm_fusedq.measure.undecoded_triton import decoding

TARGET = "sm_90"
SPEC = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
# CUDA programming guide, compute capability 9.0: registers and bytes of shared memory of an SM,
# bytes of it that every program takes besides its own, and the step of registers per thread.
_REGISTERS, _SHARED, _RESERVED, _REGISTER_STEP = 65536, 233472, 1024, 8
# What a variant that has no tile of its own is compiled as: the rules' tile of this shape.
_SHAPE = GemmShape(1, 4096, 4096)
COLUMNS = (
    *("experiment", "variant", "triton", "tile", "registers", "stack", "smem", "programs"),
    *("instructions_per_weight", "loop", "alu", "fma", "hazards", "running", "mma", "problems"),
)

app = typer.Typer(add_completion=False)


class Compiled(NamedTuple):
    """A variant and what its binary looks like."""

    variant: Variant
    row: AuditRow

    @property
    def programs(self) -> int:
        """How many run on an SM at once."""
        registers = round_up(self.row.registers, _REGISTER_STEP)
        threads = self.row.tile.num_warps * WARP_SIZE
        return min(_REGISTERS // (registers * threads), _SHARED // (self.row.smem + _RESERVED))

    @property
    def problems(self) -> str:
        return ", ".join(self.row.problems) or "fine"

    def line(self) -> str:
        row = self.row
        return (
            f"{self.variant.name}: {describe(row.tile)}: {row.registers} registers, "
            f"{row.instructions_per_weight:.2f} instructions per weight, {row.smem} bytes of "
            f"shared memory, {self.programs} programs an SM, {row.mma}: {self.problems}"
        )

    def cells(self) -> dict[str, object]:
        row = self.row
        return {name: getattr(row, name, None) for name in COLUMNS} | {
            "variant": self.variant.name,
            "triton": triton.__version__,
            "tile": describe(row.tile),
            "programs": self.programs,
            "instructions_per_weight": round(row.instructions_per_weight, 2),
            "loop": row.loop_instructions,
            "problems": self.problems,
        }


@app.command(help=__doc__)
def main(
    number: Annotated[list[int], typer.Argument(help="of the experiments")],
    file: Annotated[Path | None, typer.Option("--csv", help="write the rows to this file")] = None,
) -> None:
    spilled, cells = False, []
    for each in number:
        for found in compiled_variants(
            v for v in EXPERIMENTS[each].variants if isinstance(v, Variant)
        ):
            print(found.line(), flush=True)
            spilled |= "spills" in found.problems
            cells.append({**found.cells(), "experiment": each})
    if file is not None:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(cells)
    raise typer.Exit(spilled)


def compiled_variants(variants: Iterator[Variant]) -> Iterator[Compiled]:
    """The variants whose tile or decoder is their own."""
    chosen = select(_SHAPE, SPEC, device_by_name(TARGET), table_for=lambda _: None).tile
    for variant in variants:
        if variant.tile is None and not variant.decoders:
            continue
        with decoding(dict(variant.decoders)):
            tile = variant.tile or chosen
            yield Compiled(variant, fused.audit_tile(TARGET, tile, SPEC, torch.bfloat16))


if __name__ == "__main__":
    app()
