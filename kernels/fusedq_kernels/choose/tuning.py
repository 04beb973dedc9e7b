"""Measured launches: which row of a user's file or of `tuned/<device>.json` serves a problem.

`tuned_file.py` has the format. `heuristics.select` asks here before its rules; nothing is measured
while serving.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from math import log2
from pathlib import Path

from fusedq_kernels.choose.own_rows import OwnRows, own_rows
from fusedq_kernels.choose.tuned_file import (
    MAX_DECODE_M,
    NEAREST_FACTOR,
    OPEN_END,
    TunedRow,
    TunedTable,
    divides,
    minor,
    read,
    write,
)
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.types import DeviceSpec, GemmShape, Launch, QuantSpec

__all__ = [
    "FOLDER",
    "MAX_DECODE_M",
    "OPEN_END",
    "TunedRow",
    "TunedTable",
    "divides",
    "find",
    "forget",
    "packaged",
    "read",
    "table_for",
    "triton_version",
    "unused_files",
    "write",
]

FOLDER = Path(__file__).parent / "tuned"


def table_for(device: DeviceSpec) -> TunedTable | None:
    """The table of this device for the installed Triton, the user's own before the packaged one;
    None if there is neither.

    Raises ValueError for a packaged file that breaks the format.
    """
    own, found = _own(device).table, packaged(device)
    return found if own is None else replace(own, beside=found)


def packaged(device: DeviceSpec) -> TunedTable | None:
    """The packaged table; where no Triton is installed, as on a machine that plans, the newest.

    Raises ValueError for a file that breaks the format.
    """
    tables = _packaged(device.name)
    version = triton_version()
    if version is not None:
        tables = tuple(t for t in tables if minor(t.triton) == minor(version))
    return max(tables, key=lambda table: minor(table.triton), default=None)


def unused_files(device: DeviceSpec) -> tuple[str, ...]:
    """Which files of the user's own rows do not serve here, and why."""
    return _own(device).unused if device.kind == "cuda" else ()


def forget() -> None:
    """Read the files anew when they are asked for again."""
    _packaged.cache_clear()
    _own.cache_clear()


def find(
    table: TunedTable, shape: GemmShape, spec: QuantSpec, kernels: Iterable[str]
) -> Launch | None:
    """The measured launch for a problem, or None where no shape is near enough.

    The shape is chosen first, from weight type, group step, N and K alone, then its row by M;
    `Launch.source` names the row, and its shape where it is another. How often K is split fits one
    shape alone, so another one gets no such row. The user's own rows serve their shapes alone.
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
        and (not table.yours or key == (shape.n, shape.k))
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
    source = table.source(number)
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
def _own(device: DeviceSpec) -> OwnRows:
    return own_rows(device, triton_version())


@functools.cache
def triton_version() -> str | None:
    """The installed Triton's, None without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
