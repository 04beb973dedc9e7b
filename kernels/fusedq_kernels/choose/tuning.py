"""Measured launches: which row of `tuned/<device>.json` serves a problem.

`tuned_file.py` has the format. `heuristics.select` asks here before its rules; nothing is measured
while serving.
"""

import functools
from collections.abc import Iterable
from importlib import metadata
from math import log2
from pathlib import Path

from fusedq_kernels.choose.tuned_file import (
    MAX_DECODE_M,
    NEAREST_FACTOR,
    OPEN_END,
    TunedRow,
    TunedTable,
    divides,
    read,
    write,
)
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.types import DeviceSpec, GemmShape, Launch, QuantSpec

__all__ = ["FOLDER", "MAX_DECODE_M", "TunedRow", "TunedTable", "find", "read", "table_for", "write"]

FOLDER = Path(__file__).parent / "tuned"


def table_for(device: DeviceSpec) -> TunedTable | None:
    """The packaged table of this device for the installed Triton; None if there is none.

    Where no Triton is installed, as on a machine that only plans, the newest one.
    Raises ValueError for a file that breaks the format.
    """
    tables = _packaged(device.name)
    version = _triton_version()
    if version is not None:
        tables = tuple(t for t in tables if _minor(t.triton) == _minor(version))
    return max(tables, key=lambda table: _minor(table.triton), default=None)


def find(
    table: TunedTable, shape: GemmShape, spec: QuantSpec, kernels: Iterable[str]
) -> Launch | None:
    """The measured launch for a problem, or None where no shape is near enough.

    The shape is chosen first, from weight type, group step, N and K alone, then its row by M;
    `Launch.source` names the row, and its shape where it is another. How often K is split fits one
    shape alone, so another one gets no such row.
    Rows of kernels other than `kernels` do not count; of two for one `max_m` the faster serves.
    """
    step = group_geometry(shape.k, spec.group_size, 0).step
    allowed = set(kernels)
    shapes: dict[tuple[int, int], list[tuple[int, TunedRow]]] = {}
    for number, row in enumerate(table.rows, start=1):
        if row.weight_type is spec.weight_type and row.step == step and row.kernel in allowed:
            shapes.setdefault((row.n, row.k), []).append((number, row))
    near = {
        (_distance(key, (shape.n, shape.k)), key): rows
        for key, rows in shapes.items()
        if all(divides(row.tile, shape.n) for _, row in rows)
    }
    if not near:
        return None
    (distance, key), rows = min(near.items())
    if distance > log2(NEAREST_FACTOR):
        return None
    largest = max(row.max_m for _, row in rows)
    m = min(shape.m, largest) if largest >= OPEN_END else shape.m
    fitting = [
        (row.max_m, row.us, number, row) for number, row in rows if row.min_m <= m <= row.max_m
    ]
    if not fitting:
        return None
    *_, number, row = min(fitting, key=lambda entry: entry[:3])
    if distance and row.tile is not None and row.tile.split_k > 1:
        return None
    source = f"tuned:{table.device} row {number}"
    if distance:
        source += f", nearest shape {key[0]}x{key[1]}"
    return Launch(row.kernel, row.tile, source)


def _distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    return sum(abs(log2(a / b)) for a, b in zip(one, other, strict=True))


@functools.cache
def _packaged(device: str) -> tuple[TunedTable, ...]:
    path = FOLDER / f"{device}.json"
    return read(path) if path.is_file() else ()


@functools.cache
def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
