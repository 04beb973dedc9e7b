"""Measured rows: what a file may say, and which row a problem gets."""

import json
from dataclasses import replace

import pytest
import torch

from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.heuristics import declared_launch, reachable_launches, select
from fusedq_kernels.types import GemmShape, Launch, Policy, QuantSpec, TileConfig, WeightType

H200 = device_by_name("h200")
SPEC = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
TILE = {"block_m": 8, "block_n": 64, "split_k": 4, "num_warps": 4, "num_stages": 5}
ROW = {
    **{"weight_type": "uint4b8", "group_size": 128, "n": 4096, "k": 4096, "max_m": 8},
    **{"kernel": "triton-gemm", **TILE, "us": 5.25},
}
ROWS = [ROW, ROW | {"max_m": 64, "block_m": 64}, ROW | {"max_m": 256, "block_m": 128, "split_k": 1}]


def table_of(*rows, triton="3.9.0"):
    return {"triton": triton, "date": "2026-01-31", "commit": "0123abcd", "rows": list(rows)}


def read(tmp_path, *tables, device="h200"):
    path = tmp_path / "h200.json"
    path.write_text(json.dumps({"device": device, "tables": list(tables)}))
    return tuning.read(path)


def find(tmp_path, m, n=4096, k=4096, spec=SPEC, rows=ROWS):
    (table,) = read(tmp_path, table_of(*rows))
    return tuning.find(table, GemmShape(m, n, k), spec, ["triton-gemm"])


@pytest.mark.parametrize(("m", "number"), [(1, 1), (8, 1), (9, 2), (64, 2), (65, 3), (256, 3)])
def test_a_row_serves_the_tokens_up_to_its_own(tmp_path, m, number):
    tile = TileConfig(**TILE)
    tiles = [tile, replace(tile, block_m=64), replace(tile, block_m=128, split_k=1)]
    expected = Launch("triton-gemm", tiles[number - 1], f"tuned:h200 row {number}")
    assert find(tmp_path, m) == expected


def test_more_tokens_than_were_measured_are_left_to_the_rules(tmp_path):
    assert find(tmp_path, 257) is None


def test_another_shape_borrows_the_nearest_and_says_so(tmp_path):
    rows = [*ROWS, *(row | {"n": 6144} for row in ROWS)]
    found = find(tmp_path, 256, n=5120, rows=rows)
    assert found.source == "tuned:h200 row 6, nearest shape 6144x4096"
    assert find(tmp_path, 256, n=4096, k=8192).source.endswith("nearest shape 4096x4096")
    assert find(tmp_path, 256, n=4096, k=8320) is None
    assert find(tmp_path, 256, n=8192, k=8192) is None


def test_a_split_fits_its_own_shape_alone(tmp_path):
    assert find(tmp_path, 1).tile.split_k == 4
    assert find(tmp_path, 1, n=4224) is None


def test_the_last_row_of_prefill_serves_more_tokens_too(tmp_path):
    rows = [*ROWS[:2], ROWS[2] | {"max_m": 2048}]
    assert find(tmp_path, 1 << 16, rows=rows).source == "tuned:h200 row 3"
    assert find(tmp_path, 1 << 16, rows=[*rows[:2], ROWS[2] | {"max_m": 2047}]) is None


def test_a_borrowed_tile_must_divide_the_weight(tmp_path):
    rows = [row | {"block_n": 256, "split_k": 1} for row in ROWS]
    assert find(tmp_path, 1, n=4096 + 128, rows=rows) is None
    assert find(tmp_path, 1, n=4096 + 256, rows=rows) is not None


def test_rows_serve_only_weights_that_run_the_same_code(tmp_path):
    assert find(tmp_path, 1, spec=replace(SPEC, group_size=256)) is not None
    assert find(tmp_path, 1, spec=replace(SPEC, group_size=64)) is None
    assert find(tmp_path, 1, spec=replace(SPEC, weight_type=WeightType.NF4)) is None


def test_select_prefers_a_measured_row(tmp_path):
    (table,) = read(tmp_path, table_of(*ROWS))
    shape = GemmShape(8, 4096, 4096)
    chosen = select(shape, SPEC, H200, table_for=lambda device: table)
    assert chosen.source == "tuned:h200 row 1"
    assert select(shape, SPEC, H200, table_for=lambda device: None).source.startswith("rule: ")


def test_a_batch_invariant_layer_asks_no_rows(tmp_path):
    (table,) = read(tmp_path, table_of(*ROWS))
    shape = GemmShape(8, 4096, 4096)
    chosen = select(shape, SPEC, H200, Policy(batch_invariant=True), table_for=lambda device: table)
    assert chosen.source.endswith("batch-invariant")


def test_every_border_between_rows_is_reachable(tmp_path):
    rows = [*ROWS, ROW | {"max_m": 77, "num_stages": 2, "block_m": 128, "split_k": 1}]
    (table,) = read(tmp_path, table_of(*rows))
    found = reachable_launches(4096, 4096, SPEC, H200, 300, table_for=lambda device: table)
    assert [m for m, _ in found] == [1, 9, 65, 78, 257]


def test_a_table_serves_the_minor_version_of_its_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    read(tmp_path, table_of(*ROWS, triton="3.6.0"), table_of(*ROWS, triton="3.10.1"))
    for installed, expected in (("3.10.0", "3.10.1"), ("3.6.2", "3.6.0"), (None, "3.10.1")):
        tuning.forget()
        monkeypatch.setattr(tuning, "triton_version", lambda installed=installed: installed)
        assert tuning.table_for(H200).triton == expected
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.9.0")
    assert tuning.table_for(H200) is None
    assert tuning.table_for(device_by_name("a100")) is None
    tuning.forget()


def test_packaged_files_keep_the_format():
    for path in tuning.FOLDER.glob("*.json"):
        assert path.stem in KNOWN_DEVICES
        assert tuning.read(path)


def test_written_rows_are_read_back_one_per_line(tmp_path):
    tables = read(tmp_path, table_of(*ROWS), table_of(ROWS[1], triton="3.6.0"))
    path = tmp_path / "h200.json"
    tuning.write(path, tables)
    assert tuning.read(path) == tables
    lines = path.read_text().splitlines()
    assert sum('"us"' in line for line in lines) == 4
    assert json.loads(lines[2].rstrip(",")) == ROW


def test_a_broken_table_is_not_written(tmp_path):
    tables = read(tmp_path, table_of(*ROWS))
    path = tmp_path / "h200.json"
    before = path.read_text()
    with pytest.raises(ValueError, match="no row for max_m 64"):
        tuning.write(path, [replace(tables[0], rows=tables[0].rows[:1])])
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["h200.json"]


SLICED = {name: value for name, value in ROW.items() if name not in TILE} | {
    **{"kernel": "sliced-cublas", "max_m": 256, "us": 30.0},
}


def test_of_two_kernels_for_one_max_m_the_faster_that_is_allowed_serves(tmp_path):
    (table,) = read(tmp_path, table_of(*ROWS[:2], SLICED, ROWS[2] | {"us": 40.0}))
    both = ["triton-gemm", "sliced-cublas"]
    shape = GemmShape(256, 4096, 4096)
    expected = Launch("sliced-cublas", None, "tuned:h200 row 3")
    assert tuning.find(table, shape, SPEC, both) == expected
    assert tuning.find(table, shape, SPEC, both[:1]).source == "tuned:h200 row 4"
    (table,) = read(tmp_path, table_of(*ROWS[:2], SLICED, ROWS[2] | {"us": 20.0}))
    assert tuning.find(table, shape, SPEC, both).source == "tuned:h200 row 4"
    late = SLICED | {"min_m": 200}
    (table,) = read(tmp_path, table_of(*ROWS[:2], late, ROWS[2] | {"us": 40.0}))
    served = [tuning.find(table, GemmShape(m, 4096, 4096), SPEC, both).source for m in (199, 200)]
    assert served == ["tuned:h200 row 4", "tuned:h200 row 3"]
    border = [
        m
        for m, _ in reachable_launches(4096, 4096, SPEC, H200, 256, table_for=lambda device: table)
    ]
    assert border == [1, 9, 65, 200]
    tuning.write(tmp_path / "h200.json", [table])
    assert tuning.read(tmp_path / "h200.json") == (table,)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:2], SLICED], r"no row with a tile beside those for max_m \[256\]"),
        ([*ROWS, SLICED, SLICED], "two rows with one max_m among"),
        ([*ROWS, SLICED | {"max_m": 64}], "rows up to max_m 64 must have a tile"),
        ([*ROWS, SLICED | TILE], "row 4: sliced-cublas with a tile"),
    ],
)
def test_sliced_rows_stand_beside_fused_ones(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, table_of(*rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, r"row 1: unknown \['speed'\], missing \[\]"),
        ({"us": None}, "us must be positive, got None"),
        ({"us": "5"}, "us must be positive, got '5'"),
        ({"us": 0}, "us must be positive, got 0"),
        ({"n": 0}, "must be positive integers"),
        ({"k": 4096.0}, "must be positive integers"),
        ({"num_warps": 0}, "must be positive integers"),
        ({"weight_type": "uint5"}, "'uint5' is not a valid WeightType"),
        ({"kernel": "marlin"}, "kernel must be triton-gemm or sliced-cublas, got 'marlin'"),
        ({"kernel": "cpu-striped"}, "kernel must be triton-gemm or sliced-cublas, got 'cpu-str"),
        ({"kernel": "sliced-cublas"}, "sliced-cublas with a tile"),
        ({"x_descriptor": 1}, "x_descriptor must be true or false, got 1"),
        ({"block_n": 96}, "block_n 96 does not divide"),
        ({"segments": 2}, r"unknown \['segments'\]"),
        (
            {"n": 917504, "block_n": 128, "max_m": 64, "block_m": 16},
            "split_k of 28672 output tiles, at most 16384 can be split",
        ),
        ({"x_descriptor": True, "group_size": 8}, "x_descriptor needs sm_90 or newer and groups"),
        ({"split_k": 12}, "split_k 12 leaves a split of K empty"),
        (
            {"max_m": 2048, "block_m": 128},
            "row 1: split_k of a row for any number of tokens from 2048 on",
        ),
        ({"min_m": 2}, "min_m of a row with a tile, which nothing stands in for"),
        ({"min_m": 0}, "must be positive integers"),
        ({"max_m": 64}, "two rows with one max_m"),
    ],
)
def test_a_broken_row_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"h200.json, triton 3.9.0.*{message}"):
        read(tmp_path, table_of(ROW | change, *ROWS[1:]))


def test_a_tile_is_all_or_nothing(tmp_path):
    cells = {name: value for name, value in ROW.items() if name != "num_warps"}
    with pytest.raises(ValueError, match=r"a tile without \['num_warps'\]"):
        read(tmp_path, table_of(cells))
    cells = {name: value for name, value in ROW.items() if name not in TILE}
    with pytest.raises(ValueError, match="triton-gemm without a tile"):
        read(tmp_path, table_of(cells))


def test_the_tensor_memory_accelerator_needs_its_device(tmp_path):
    rows = [row | {"x_descriptor": True} for row in ROWS]
    assert read(tmp_path, table_of(*rows))[0].rows[0].tile.x_descriptor
    path = tmp_path / "a100.json"
    path.write_text(json.dumps({"device": "a100", "tables": [table_of(*rows)]}))
    with pytest.raises(ValueError, match=r"a100.json.*row 1: x_descriptor needs sm_90"):
        tuning.read(path)


def test_a_file_belongs_to_one_device(tmp_path):
    with pytest.raises(ValueError, match="device is 'h100', expected 'h200'"):
        read(tmp_path, device="h100")
    with pytest.raises(ValueError, match=r"expected the keys .* got \['rows', 'triton'\]"):
        read(tmp_path, {"triton": "3.9.0", "rows": []})


@pytest.mark.parametrize(
    ("n", "k", "first"),
    [(6144, 4096, 1025), (4096, 4096, 1025), (28672, 4096, 1025), (4096, 14336, 4097)],
)
def test_an_h200_slices_prefill_as_measured_unless_forbidden(monkeypatch, n, k, first):
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.6.0")
    declared = declared_launch(n, k, SPEC, H200)
    assert (declared.min_tokens, declared.launch.kernel) == (first, "sliced-cublas")

    def kernel(m, **options):
        return select(GemmShape(m, n, k), SPEC, H200, Policy(**options)).kernel

    for m in (first, 8192, 1 << 16):
        assert kernel(m, sliced_prefill=True) == "sliced-cublas"
        assert kernel(m, sliced_prefill=False) == "triton-gemm"
        assert kernel(m, sliced_prefill=True, batch_invariant=True) == "triton-gemm"
    assert kernel(first - 1, sliced_prefill=True) == "triton-gemm"
    assert declared_launch(n, k, SPEC, device_by_name("h100")) is None
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.9.0")
    assert declared_launch(n, k, SPEC, H200) is None
