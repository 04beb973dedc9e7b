"""The fastest measured tile of each problem beside what the rules choose.

    python benchmarks/best_tiles.py benchmarks/results/h200
    python benchmarks/best_tiles.py benchmarks/results/h200 --write     # also tuned/<device>.json

reads what single tiles took (gemmbench/measured.py). `--write` makes rows of the fastest tiles of
the rules, in the form of the kernel that is right for every shape, and of sliced-cublas where it is
faster than all of them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import SLICED, select, tiles_for
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import GemmShape, QuantSpec, TileConfig, WeightType
from gemmbench import measured
from gemmbench.variants import describe
from vllm_fusedq.measure import candidates

SPEC = QuantSpec(WeightType.UINT4B8, 128, DType.BFLOAT16)
# A row serves the tokens up to its own: one token was measured in place of eight.
ROW_OF = {1: 8}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Comparison:
    """`loss` is how much longer the rules' tile takes than the fastest; None if not measured."""

    shape: GemmShape
    best: measured.Timing
    chosen: TileConfig
    loss: float | None


def compare(folder: Path, device: str) -> Iterator[Comparison]:
    """A comparison per problem, fewest tokens first."""
    target = device_by_name(device)
    for shape, members in problems(measured.timings(folder)).items():
        chosen = select(shape, SPEC, target, table_for=lambda _: None).tile
        assert chosen is not None
        best = min(members, key=lambda each: each.us)
        same = [each.us for each in members if each.tile == chosen]
        yield Comparison(shape, best, chosen, min(same) / best.us - 1 if same else None)


def problems(
    timings: Iterable[measured.Timing],
) -> dict[GemmShape, list[measured.Timing]]:
    """The timed tiles of each problem, fewest tokens first."""
    found: dict[GemmShape, list[measured.Timing]] = defaultdict(list)
    for each in timings:
        if each.tile is not None:
            found[each.shape].append(each)
    return dict(sorted(found.items(), key=lambda item: (item[0].m, item[0].n, item[0].k)))


def geometric_mean(losses: Iterable[float]) -> float:
    logs = [math.log1p(loss) for loss in losses]
    return math.expm1(sum(logs) / len(logs))


def measurements(folder: Path, device: str) -> Iterator[candidates.Measurement]:
    """What rows are made of: shapes that were measured for few and for many tokens."""
    known = set(tiles_for(device_by_name(device), SPEC.weight_type, SPEC.group_size))
    timings = list(measured.timings(folder))
    many = {(each.shape.n, each.shape.k) for each in timings if each.shape.m > 64}
    for each in timings:
        right = measured.is_right_form(each) and replace(each.tile, split_k=1) in known
        if (each.shape.n, each.shape.k) in many and (right or each.kernel == SLICED):
            shape = replace(each.shape, m=ROW_OF.get(each.shape.m, each.shape.m))
            yield candidates.Measurement(shape, SPEC, each.tile, each.us, each.kernel)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Argument(help="named like the device")],
    write: Annotated[bool, typer.Option(help="write the rows of this device's tuned file")] = False,
    triton: Annotated[str, typer.Option(help="that was measured")] = "3.6.0",
    date: Annotated[str, typer.Option()] = "2026-11-27",
    commit: Annotated[str, typer.Option()] = "e12045d+experiment",
) -> None:
    device = folder.resolve().name
    losses = []
    for each in compare(folder, device):
        shape = f"m={each.shape.m} n={each.shape.n} k={each.shape.k}"
        loss = "not measured" if each.loss is None else f"{100 * each.loss:+.1f} %"
        best = f"{each.best.us:.2f} us {describe(each.best.tile)}"
        print(f"{shape}: {best}; rules: {describe(each.chosen)}, {loss}")
        losses += [] if each.loss is None else [each.loss]
    print(f"geometric mean {100 * geometric_mean(losses):.2f} %, worst {100 * max(losses):.1f} %")
    if write:
        path = tuning.FOLDER / f"{device}.json"
        rows = candidates.tuned_rows(measurements(folder, device))
        table = tuning.TunedTable(device, triton, date, commit, tuple(rows))
        tuning.write(path, [table])
        print(f"{len(table.rows)} rows in {path}")


if __name__ == "__main__":
    app()
