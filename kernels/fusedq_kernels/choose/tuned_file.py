"""The format of `tuned/<device>.json`: its rows, reader, writer and checks.

`benchmarks/tune.py` and `fusedq tune` write, `tuning.py` reads. One file per device, one line per
row:

    {"device": "h200", "tables": [
     {"triton": "3.9.0", "date": "2026-01-31", "commit": "0123abcd", "rows": [
      {"weight_type": "uint4b8", "group_size": 128, "n": 4096, "k": 4096, "max_m": 8,
       "kernel": "triton-gemm", "block_m": 8, "block_n": 128, "split_k": 8, "num_warps": 4,
       "num_stages": 4, "us": 5.31}
     ]}
    ]}

- `device` is a name of `device.KNOWN_DEVICES`, in a user's file that of any GPU, and the file's
  stem. A table serves every patch
  release of its Triton's minor version and no other: what compiles well in one may spill in the
  next.
- `weight_type`, `group_size`, `n` (out_features) and `k` (in_features) are those of one rank's
  weight; a per-channel scheme has `group_size >= k`. Rows that agree in them form a shape.
- A row serves the tokens above the next smaller `max_m` of its shape, up to its own; the largest
  serves more tokens too if it is OPEN_END or more, else they are left to the rules. `max_m` 64 must
  be there, so that no shape has rows for prefill alone. Batch-invariant layers ask no rows: the
  split of K may differ from row to row.
- `kernel` and the tile: every field of `types.TileConfig` but `segments`, which belongs to
  batch-invariant layers; those with a default may be left out. A kernel without a tile has none:
  `sliced-cublas`, for more than 64 tokens only. Beside its row stands one of `triton-gemm` with the
  same `max_m`, for servers that forbid it and for fewer tokens than its `min_m` (1 if left out).
- `us` is the measured time in microseconds, for people to read.

Rows are numbered from 1 within their table, in file order.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.geometry import (
    BLOCK_K,
    BLOCK_N,
    MAX_TILES,
    group_geometry,
    round_up,
    whole_splits,
)
from fusedq_kernels.types import TileConfig, WeightType

# The kernels that a row may name: the one of the rules, and one without a tile.
FUSED, SLICED = "triton-gemm", "sliced-cublas"

# How the source of a launch begins that the user's own rows name.
YOURS = "tuned: yours"

# Up to this many tokens are decoding: rows for them come first, and weights stay exact.
MAX_DECODE_M = 64

# From this many tokens on a GPU is full for many waves, and more tokens take the same launch.
OPEN_END = 2048

# A shape borrows the rows of another whose N and K differ by at most this factor together.
NEAREST_FACTOR = 2

_KEY_FIELDS = ("weight_type", "group_size", "n", "k", "max_m", "kernel")
_TILE_FIELDS = {field.name: field for field in fields(TileConfig) if field.name != "segments"}


@dataclass(frozen=True, slots=True)
class TunedRow:
    """One measured launch; the module docstring says what each field means."""

    weight_type: WeightType
    group_size: int
    n: int
    k: int
    max_m: int
    kernel: str
    tile: TileConfig | None
    us: float
    min_m: int = 1

    @property
    def step(self) -> int:
        """`GroupGeometry.step`: rows of different steps run different code."""
        return group_geometry(self.k, self.group_size, 0).step

    @property
    def shape(self) -> tuple[WeightType, int, int, int]:
        """What rows of one shape have in common."""
        return self.weight_type, self.step, self.n, self.k


@dataclass(frozen=True, slots=True)
class TunedTable:
    """Rows measured on one device under one Triton version, in file order.

    `yours` are the user's own, which serve the shapes that were measured alone. `beside` has the
    rows that serve where these do not.
    """

    device: str
    triton: str
    date: str
    commit: str
    rows: tuple[TunedRow, ...]
    yours: bool = False
    beside: "TunedTable | None" = None

    def source(self, number: int) -> str:
        """What a plan calls a row, counted from 1."""
        return f"{YOURS}, row {number}" if self.yours else f"tuned:{self.device} row {number}"


def minor(version: str) -> tuple[int, ...]:
    """Major and minor version of a Triton; raises ValueError for what is no version."""
    return tuple(int(part) for part in version.split(".")[:2])


def read(
    path: Path, capability: tuple[int, int] | None = None, yours: bool = False
) -> tuple[TunedTable, ...]:
    """The tables of one file; ValueError names the file, table and row that break the format.

    A device that is not known by its name needs its compute `capability`.
    """
    capability = capability or device_by_name(path.stem).capability
    content = _keys(json.loads(path.read_text()), {"device", "tables"}, path.name)
    if content["device"] != path.stem:
        raise ValueError(f"{path.name}: device is {content['device']!r}, expected {path.stem!r}")
    tables = []
    for entry in _list(content["tables"], f"{path.name}, tables"):
        triton = entry.get("triton") if isinstance(entry, Mapping) else None
        where = f"{path.name}, triton {triton}"
        entry = _keys(entry, {"triton", "date", "commit", "rows"}, where)
        header = (str(entry[key]) for key in ("triton", "date", "commit"))
        minor(str(triton))
        rows = tuple(
            _parse_row(row, capability, f"{where}, row {number}")
            for number, row in enumerate(_list(entry["rows"], f"{where}, rows"), start=1)
        )
        _check_shapes(rows, where)
        tables.append(TunedTable(path.stem, *header, rows, yours))
    return tuple(tables)


def write(
    path: Path, tables: Iterable[TunedTable], capability: tuple[int, int] | None = None
) -> None:
    """Write tables of one device, one row per line; `read` must accept the result.

    Whoever reads meanwhile, or after a death at any moment, finds a whole file. Raises ValueError,
    and leaves the file as it was, for tables that break the format.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        draft = Path(folder) / path.name
        draft.write_text(_dumps(path.stem, tables))
        read(draft, capability)
        draft.replace(path)


def _dumps(device: str, tables: Iterable[TunedTable]) -> str:
    blocks = []
    for table in tables:
        header = {"triton": table.triton, "date": table.date, "commit": table.commit}
        lines = ",\n".join(f"  {json.dumps(_as_json(row))}" for row in table.rows)
        blocks.append(f' {json.dumps(header)[:-1]}, "rows": [\n{lines}\n ]}}')
    joined = ",\n".join(blocks)
    return f'{{"device": {json.dumps(device)}, "tables": [\n{joined}\n]}}\n'


def _as_json(row: TunedRow) -> dict[str, Any]:
    cells = {name: getattr(row, name) for name in _KEY_FIELDS}
    cells["weight_type"] = row.weight_type.value
    for name, field in _TILE_FIELDS.items():
        if row.tile is not None and getattr(row.tile, name) != field.default:
            cells[name] = getattr(row.tile, name)
    if row.min_m > 1:
        cells["min_m"] = row.min_m
    return cells | {"us": row.us}


def _keys(found: Any, expected: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping) or set(found) != expected:
        keys = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{where}: expected the keys {sorted(expected)}, got {keys}")
    return found


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"{where}: expected a list, got {type(found).__name__}")
    return found


def _parse_row(cells: Any, capability: tuple[int, int], where: str) -> TunedRow:
    if not isinstance(cells, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(cells).__name__}")
    unknown = set(cells) - {*_KEY_FIELDS, *_TILE_FIELDS, "us", "min_m"}
    missing = {*_KEY_FIELDS, "us"} - set(cells)
    if unknown or missing:
        raise ValueError(f"{where}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    tile_cells = {name: cells[name] for name in _TILE_FIELDS if name in cells}
    tile = None
    if tile_cells:
        needed = {name for name, field in _TILE_FIELDS.items() if field.default is MISSING}
        if not needed <= set(tile_cells):
            raise ValueError(f"{where}: a tile without {sorted(needed - set(tile_cells))}")
        tile = TileConfig(**tile_cells)
    try:
        weight_type = WeightType(cells["weight_type"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    kernel = cells["kernel"]
    if kernel not in (FUSED, SLICED):
        raise ValueError(f"{where}: kernel must be {FUSED} or {SLICED}, got {kernel!r}")
    sizes = {name: cells[name] for name in ("group_size", "n", "k", "max_m")}
    sizes["min_m"] = cells.get("min_m", 1)
    row = TunedRow(weight_type, kernel=kernel, tile=tile, us=cells["us"], **sizes)
    _check_row(row, sizes, where)
    _check_tile(row, capability, where)
    return row


def _check_row(row: TunedRow, sizes: Mapping[str, Any], where: str) -> None:
    cells = {name: getattr(row.tile, name) for name in _TILE_FIELDS} if row.tile else {}
    sizes = {**sizes, **{name: cells[name] for name in cells if _TILE_FIELDS[name].type is int}}
    if any(type(size) is not int or size < 1 for size in sizes.values()):
        raise ValueError(f"{where}: sizes must be positive integers, got {sizes}")
    for name in set(cells) - set(sizes):
        if type(cells[name]) is not bool:
            raise ValueError(f"{where}: {name} must be true or false, got {cells[name]!r}")
    if not isinstance(row.us, int | float) or not row.us > 0:
        raise ValueError(f"{where}: us must be positive, got {row.us!r}")
    if (row.tile is None) is (row.kernel == FUSED):
        raise ValueError(f"{where}: {row.kernel} {'without' if not row.tile else 'with'} a tile")


def _check_tile(row: TunedRow, capability: tuple[int, int], where: str) -> None:
    if row.tile is None:
        return
    if not divides(row.tile, row.n):
        raise ValueError(f"{where}: block_n {row.tile.block_n} does not divide the padded N")
    num_blocks = -(-row.k // BLOCK_K)
    if row.tile.split_k != whole_splits(num_blocks, row.tile.split_k):
        raise ValueError(f"{where}: split_k {row.tile.split_k} leaves a split of K empty")
    tiles = -(-row.max_m // row.tile.block_m) * (round_up(row.n, BLOCK_N) // row.tile.block_n)
    if row.tile.split_k > 1 and tiles > MAX_TILES:
        raise ValueError(
            f"{where}: split_k of {tiles} output tiles, at most {MAX_TILES} can be split"
        )
    if row.tile.split_k > 1 and row.max_m >= OPEN_END:
        raise ValueError(f"{where}: split_k of a row for any number of tokens from {OPEN_END} on")
    if row.tile.x_descriptor and (row.step < 16 or capability < (9, 0)):
        raise ValueError(f"{where}: x_descriptor needs sm_90 or newer and groups of whole 16 rows")


def _check_shapes(rows: Iterable[TunedRow], where: str) -> None:
    shapes: dict[tuple, list[TunedRow]] = {}
    for row in rows:
        shapes.setdefault(row.shape, []).append(row)
    for (weight_type, _, n, k), members in shapes.items():
        name = f"{where}, shape {weight_type.value} {n}x{k}"
        tokens = [row.max_m for row in members]
        if len({(row.max_m, row.kernel) for row in members}) < len(tokens):
            raise ValueError(f"{name}: two rows with one max_m among {sorted(tokens)}")
        fused = {row.max_m for row in members if row.tile is not None}
        if alone := sorted(set(tokens) - fused):
            raise ValueError(f"{name}: no row with a tile beside those for max_m {alone}")
        if MAX_DECODE_M not in tokens:
            raise ValueError(f"{name}: no row for max_m {MAX_DECODE_M}")
        if any(row.tile is None for row in members if row.max_m <= MAX_DECODE_M):
            raise ValueError(f"{name}: rows up to max_m {MAX_DECODE_M} must have a tile")
        if any(row.tile is not None and row.min_m > 1 for row in members):
            raise ValueError(f"{name}: min_m of a row with a tile, which nothing stands in for")


def divides(tile: TileConfig | None, n: int) -> bool:
    """Whether the tile's width divides the padded N."""
    return tile is None or round_up(n, BLOCK_N) % tile.block_n == 0
