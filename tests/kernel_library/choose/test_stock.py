"""The table of stock's measured kernels: its file, and what is read from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusedq_kernels import DType, QuantSpec, WeightType
from fusedq_kernels.choose import stock
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.stock import StockRow, StockTable

INT4 = QuantSpec(WeightType.UINT4B8, 128, DType.FLOAT16)
SIZES = (WeightType.UINT4B8, 128, DType.BFLOAT16, 4096, 8192)


def row(m: int, speedup: float, kernel: str = "machete") -> StockRow:
    return StockRow(*SIZES, m, 10.0 * speedup, kernel, "vllm 0.32.0", 10.0)


def table_of(*rows: StockRow) -> StockTable:
    return StockTable("h200", "2026-01-31", "0123abcd", rows)


def test_written_rows_are_read_back_one_per_line(tmp_path: Path) -> None:
    path = stock.file_of(tmp_path, "h200")
    table = table_of(row(1, 0.5), row(16, 1.12))
    stock.write(path, table)
    assert path.name == "h200.stock.json"
    assert stock.read(path) == table
    assert len(path.read_text().splitlines()) == 2 + len(table.rows)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([(1, 0.9), (16, 1.01)], ""),
        ([(1, 1.04), (4, 1.12), (16, 1.03), (64, 0.8)], "machete up to 1.12x at M 1 to 16 (V)"),
        ([(1, 1.5), (4, 0.9), (16, 1.2)], "machete 1.50x at M 1 (V), machete 1.20x at M 16 (V)"),
        ([(64, 1.02)], "machete 1.02x at M 64 (V)"),
    ],
)
def test_what_is_said_of_faster_kernels(speedups: list, expected: str) -> None:
    rows = [row(m, speedup) for m, speedup in speedups]
    assert stock.describe(rows) == expected.replace("V", "vllm 0.32.0")


def test_each_kernel_is_named_for_its_tokens() -> None:
    rows = [row(1, 1.1), row(4, 1.2, "marlin"), row(8, 1.3, "marlin")]
    expected = "machete 1.10x at M 1 (V), marlin up to 1.30x at M 4 to 8 (V)"
    assert stock.describe(rows) == expected.replace("V", "vllm 0.32.0")


def test_only_the_same_weight_counts() -> None:
    table = table_of(row(64, 2.0), row(1, 2.0))
    assert [each.m for each in table.find(4096, 8192, INT4, DType.BFLOAT16)] == [1, 64]
    assert table.find(4096, 4096, INT4, DType.BFLOAT16) == ()
    assert table.find(4096, 8192, INT4, DType.FLOAT16) == ()
    assert table.find(4096, 8192, replace(INT4, group_size=64), DType.BFLOAT16) == ()
    zeros = replace(INT4, weight_type=WeightType.UINT4)
    assert table.find(4096, 8192, zeros, DType.BFLOAT16) == ()


def test_a_group_for_all_of_k_is_one_scheme_whatever_its_size() -> None:
    table = table_of(replace(row(1, 2.0), group_size=8192))
    whole = replace(INT4, group_size=16384)
    assert len(table.find(4096, 8192, whole, DType.BFLOAT16)) == 1


def test_a_table_serves_its_own_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "FOLDER", tmp_path)
    stock.table_for.cache_clear()
    stock.write(stock.file_of(tmp_path, "h200"), table_of(row(1, 2.0)))
    try:
        assert stock.table_for(device_by_name("h200")) == table_of(row(1, 2.0))
        assert stock.table_for(device_by_name("h100")) is None
    finally:
        stock.table_for.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "row 1: sizes must be positive integers"),
        ({"n": "4096"}, "row 1: sizes must be positive integers"),
        ({"stock_us": 0}, "row 1: times must be positive"),
        ({"us": None}, "row 1: times must be positive"),
        ({"weight_type": "int4"}, "row 1: 'int4' is not a valid WeightType"),
        ({"act_dtype": "half"}, "row 1: 'half' is not a valid DType"),
        ({"tile": 1}, "row 1: expected the keys"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, change: dict, message: str) -> None:
    path = stock.file_of(tmp_path, "h200")
    stock.write(path, table_of(row(1, 2.0)))
    content = json.loads(path.read_text())
    content["rows"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"h200.stock.json, {message}"):
        stock.read(path)


def test_a_file_names_its_device(tmp_path: Path) -> None:
    path = stock.file_of(tmp_path, "h100")
    stock.write(path, table_of(row(1, 2.0)))
    with pytest.raises(ValueError, match="of device 'h100'"):
        stock.read(path)


def test_packaged_files_keep_the_format() -> None:
    for path in stock.FOLDER.glob("*.stock.json"):
        assert stock.read(path).device in KNOWN_DEVICES
