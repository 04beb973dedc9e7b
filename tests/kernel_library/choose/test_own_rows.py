"""The user's own measured rows: which file serves, which is left alone, and what a plan says."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import partial_sum_bytes, reachable_launches, select
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec, GemmShape, QuantSpec, WeightType

H200 = device_by_name("h200")
SPEC = QuantSpec(WeightType.UINT4B8, 128, DType.FLOAT16)
TILE = {"block_m": 64, "block_n": 64, "split_k": 1, "num_warps": 4, "num_stages": 3}


def row(**changes: Any) -> dict[str, Any]:
    shape = {"weight_type": "uint4b8", "group_size": 128, "n": 4096, "k": 4096, "max_m": 64}
    return {**shape, "kernel": "triton-gemm", **TILE, "us": 5.0} | changes


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user and an empty package, Triton 3.9.0."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "package")
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.9.0")
    (tmp_path / "package").mkdir()
    tuning.forget()
    yield tmp_path
    tuning.forget()


def put(path: Path, *rows: dict[str, Any], triton: str = "3.9.0", device: str = "h200") -> Path:
    table = {"triton": triton, "date": "2026-01-31", "commit": "0123abcd", "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "tables": [table]}))
    tuning.forget()
    return path


def own(folders: Path, triton: str = "3.9", device: str = "h200") -> Path:
    return folders / "cache/vllm-fusedq/tuned" / f"triton-{triton}" / f"{device}.json"


def chosen(m: int = 8, n: int = 4096, k: int = 4096, device: DeviceSpec = H200) -> str:
    return select(GemmShape(m, n, k), SPEC, device).source


def test_own_rows_come_before_packaged_ones_and_these_before_the_rules(folders: Path) -> None:
    assert chosen().startswith("rule: ")
    put(folders / "package/h200.json", row(), row(n=8192))
    assert chosen() == "tuned:h200 row 1"
    put(own(folders), row(n=1024), row(n=2048), row())
    assert chosen() == "tuned: yours, row 3"
    assert chosen(n=8192) == "tuned:h200 row 2"
    assert chosen(m=65).startswith("rule: ")


def test_own_rows_serve_their_shapes_alone(folders: Path) -> None:
    put(own(folders), row())
    assert chosen(n=4224).startswith("rule: ")
    put(folders / "package/h200.json", row())
    assert chosen(n=4224) == "tuned:h200 row 1, nearest shape 4096x4096"


def test_what_is_reached_counts_the_borders_of_both(folders: Path) -> None:
    split = row(max_m=77, split_k=4)
    put(folders / "package/h200.json", row(), row(max_m=128, num_stages=2))
    put(own(folders), row(num_warps=8), split)
    found = reachable_launches(4096, 4096, SPEC, H200, 100)
    assert [(m, launch.source) for m, launch in found] == [
        (1, "tuned: yours, row 1"),
        (65, "tuned: yours, row 2"),
        (78, "tuned:h200 row 2"),
    ]
    assert partial_sum_bytes(4096, 4096, SPEC, H200) >= 4 * 4 * 77 * 4096


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ({"triton": "3.6"}, "not used: measured with Triton 3.6, this is 3.9.0"),
        ({"device": "a100"}, "not used: measured on a100, this is h200"),
    ],
)
def test_a_file_of_another_triton_or_device_is_not_used_and_said(
    folders: Path, place: dict[str, str], why: str
) -> None:
    put(own(folders, **place), row(), device=place.get("device", "h200"))
    path = own(folders, **place)
    assert chosen().startswith("rule: ")
    assert tuning.unused_files(H200) == (f"{path}: {why}",)


def test_a_file_that_was_renamed_is_of_the_triton_that_it_names(folders: Path) -> None:
    path = put(own(folders), row(), triton="3.6.0")
    assert chosen().startswith("rule: ")
    expected = f"{path}: not used: measured with Triton 3.6.0, this is 3.9.0"
    assert tuning.unused_files(H200) == (expected,)


def test_a_patch_release_is_the_same_triton(folders: Path) -> None:
    put(own(folders), row(), triton="3.9.4")
    assert chosen() == "tuned: yours, row 1"
    assert tuning.unused_files(H200) == ()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "\u0000", '{"device": "h200"}', '{"device": "a100", "tables": []}'),
        *('{"device": "h200", "tables": 3}', '{"device": "h200", "tables": [7]}'),
        '{"device": "h200", "tables": [{"triton": "x", "date": "", "commit": "", "rows": []}]}',
        '{"device": "h200", "tables": [{"triton": "3.9", "date": "", "commit": "", "rows": [1]}]}',
    ],
)
def test_a_damaged_file_is_not_used_and_said(folders: Path, content: str) -> None:
    path = own(folders)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    tuning.forget()
    assert chosen().startswith("rule: ")
    (why,) = tuning.unused_files(H200)
    assert why.startswith(f"{path}: not used, as it cannot be read: ")


def test_a_gpu_that_is_not_known_by_name_has_rows_too(folders: Path) -> None:
    device = DeviceSpec("some-new-gpu", "cuda", (9, 0), 100, 227 * 1024)
    wide = row(x_descriptor=True, scale_weights=True, max_m=128)
    put(own(folders, device="some-new-gpu"), row(), wide, device="some-new-gpu")
    assert chosen(device=device) == "tuned: yours, row 1"
    older = DeviceSpec("some-new-gpu", "cuda", (8, 9), 100, 99 * 1024)
    assert chosen(device=older).startswith("rule: ")
    assert "x_descriptor needs sm_90" in tuning.unused_files(older)[0]


def test_without_triton_own_rows_do_not_serve(folders: Path, monkeypatch) -> None:
    put(own(folders), row())
    monkeypatch.setattr(tuning, "triton_version", lambda: None)
    tuning.forget()
    assert chosen().startswith("rule: ")
