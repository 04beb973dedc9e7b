"""Where a kernel of stock vLLM was measured beside ours: `tuned/<device>.stock.json`.

`benchmarks/stock_table.py` makes the file from the measurements of `benchmarks/bench_gemm.py`, and
`fusedq check` reads it. One file per device, one line per row:

    {"device": "h200", "date": "2026-01-31", "commit": "0123abcd", "rows": [
     {"weight_type": "uint4b8", "group_size": 128, "act_dtype": "bfloat16", "n": 4096, "k": 4096,
      "m": 16, "us": 5.31, "stock": "machete", "version": "vllm 0.32.0", "stock_us": 4.97}
    ]}

- `n` (out_features), `k` (in_features) and `group_size` are those of one rank's weight, `m` is the
  number of tokens; a per-channel scheme has `group_size >= k`.
- `us` is the time of our kernel, `stock_us` that of the fastest of stock vLLM's kernels in the same
  run, both in microseconds; `stock` and `version` name that kernel.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fusedq_kernels.choose.tuning import FOLDER
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec, QuantSpec, WeightType

# Less is within what two runs of one kernel differ by.
MIN_SPEEDUP = 1.02


@dataclass(frozen=True, slots=True)
class StockRow:
    """One problem; the module docstring says what each field means."""

    weight_type: WeightType
    group_size: int
    act_dtype: DType
    n: int
    k: int
    m: int
    us: float
    stock: str
    version: str
    stock_us: float

    @property
    def speedup(self) -> float:
        """How many times faster stock's kernel is than ours."""
        return self.us / self.stock_us

    @property
    def is_faster(self) -> bool:
        """Whether stock's kernel is faster by more than noise."""
        return self.speedup >= MIN_SPEEDUP

    def is_of(self, n: int, k: int, spec: QuantSpec, act_dtype: DType) -> bool:
        """Whether this is a measurement of such a weight, whatever the number of tokens."""
        groups = (self.group_size, spec.group_size)
        return (
            (self.weight_type, self.act_dtype) == (spec.weight_type, act_dtype)
            and (self.n, self.k) == (n, k)
            and (groups[0] == groups[1] or min(groups) >= k)
        )


@dataclass(frozen=True, slots=True)
class StockTable:
    """Rows measured on one device, in file order."""

    device: str
    date: str
    commit: str
    rows: tuple[StockRow, ...]

    def find(self, n: int, k: int, spec: QuantSpec, act_dtype: DType) -> tuple[StockRow, ...]:
        """The measurements of such a weight, by the number of tokens; no other shape's."""
        found = (row for row in self.rows if row.is_of(n, k, spec, act_dtype))
        return tuple(sorted(found, key=lambda row: row.m))


@functools.cache
def table_for(device: DeviceSpec) -> StockTable | None:
    """The packaged table of this very device, None if there is none.

    Raises ValueError for a file that breaks the format.
    """
    path = file_of(FOLDER, device.name)
    return read(path) if path.is_file() else None


def file_of(folder: Path, device: str) -> Path:
    """Where the table of a device lies."""
    return folder / f"{device}.stock.json"


def read(path: Path) -> StockTable:
    """The table of one file; ValueError names the file and the row that break the format."""
    content = json.loads(path.read_text())
    device = path.name.removesuffix(".stock.json")
    expected = {"device", "date", "commit", "rows"}
    if not isinstance(content, dict) or set(content) != expected or content["device"] != device:
        raise ValueError(f"{path.name}: expected {sorted(expected)} of device {device!r}")
    rows = tuple(
        _parse(row, f"{path.name}, row {number}")
        for number, row in enumerate(content["rows"], start=1)
    )
    return StockTable(device, str(content["date"]), str(content["commit"]), rows)


def write(path: Path, table: StockTable) -> None:
    """Write a table, one row per line."""
    header = {"device": table.device, "date": table.date, "commit": table.commit}
    lines = ",\n".join(f" {json.dumps(_as_json(row))}" for row in table.rows)
    path.write_text(f'{json.dumps(header)[:-1]}, "rows": [\n{lines}\n]}}\n')


def describe(rows: Iterable[StockRow]) -> str:
    """Where stock is faster: "machete up to 1.12x at M 1 to 16 (vllm 0.32.0)"; empty if nowhere.

    Args:
        rows: the measurements of one weight, as `StockTable.find` returns them.
    """
    runs: list[list[StockRow]] = []
    before: StockRow | None = None
    for row in rows:
        if row.is_faster:
            if before is not None and before.is_faster and before.stock == row.stock:
                runs[-1].append(row)
            else:
                runs.append([row])
        before = row
    return ", ".join(_describe_run(run) for run in runs)


def _describe_run(run: list[StockRow]) -> str:
    best = max(run, key=lambda row: row.speedup)
    first, last = run[0].m, run[-1].m
    tokens = f"M {first}" if first == last else f"M {first} to {last}"
    up_to = "" if first == last else "up to "
    return f"{best.stock} {up_to}{best.speedup:.2f}x at {tokens} ({best.version})"


def _as_json(row: StockRow) -> dict[str, Any]:
    return asdict(row) | {"weight_type": row.weight_type.value, "act_dtype": row.act_dtype.value}


def _parse(cells: Any, where: str) -> StockRow:
    names = [field.name for field in fields(StockRow)]
    if not isinstance(cells, dict) or set(cells) != set(names):
        raise ValueError(f"{where}: expected the keys {names}")
    sizes = [cells[name] for name in ("group_size", "n", "k", "m")]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"{where}: sizes must be positive integers, got {sizes}")
    times = [cells["us"], cells["stock_us"]]
    if any(type(time) not in (int, float) or not time > 0 for time in times):
        raise ValueError(f"{where}: times must be positive, got {times}")
    try:
        types = {
            "weight_type": WeightType(cells["weight_type"]),
            "act_dtype": DType(cells["act_dtype"]),
        }
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return StockRow(**{**cells, **types})
