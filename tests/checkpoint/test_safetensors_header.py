"""Every way in which a safetensors header can be wrong, and agreement with the real writer."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_fusedq.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo, read_header
from vllm_fusedq.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "F16", shape: Any = (2, 3), start: Any = 0, stop: Any = 12) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_reads_what_the_real_writer_wrote(tmp_path: Path) -> None:
    tensors = {
        "a.qweight": torch.zeros(4, 3, dtype=torch.int32),
        "b.scales": torch.zeros(2, 5, dtype=torch.bfloat16),
        "c": torch.zeros((), dtype=torch.float64),
        "d": torch.zeros(0, 7, dtype=torch.uint8),
        "e": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert found["a.qweight"] == TensorInfo("a.qweight", "I32", (4, 3), "model.safetensors")
    assert found["b.scales"].dtype == "BF16"
    assert found["e"].dtype == "F8_E4M3"
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].nbytes == tensor.nbytes
    assert len(found) == len(tensors)


def test_reads_every_dtype(tmp_path: Path) -> None:
    header, end = {}, 0
    for dtype, bits in DTYPE_BITS.items():
        header[dtype] = entry(dtype, [8], end, end + bits)
        end += bits
    found = read_header(write(tmp_path / "x.safetensors", header, bytes(end)))
    assert {name: info.nbytes for name, info in found.items()} == DTYPE_BITS


def test_an_empty_file_list_is_fine(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}})) == {}


TWO = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)}

BAD = {
    "not-utf8": (b'{"\xff": 1}', b"", "not UTF-8"),
    "not-json": (b'{"a": ', b"", "not JSON"),
    "huge-number": (b"1" * 5000, b"", "not JSON"),
    "deep": (b"[" * 200_000, b"", "not JSON"),
    "list": ([], b"", "a JSON list, not an object"),
    "nan": (b'{"a": NaN}', b"", "not JSON: NaN is no JSON number"),
    "surrogate": (b'{"\\ud800": 1}', b"", "not JSON: .* surrogates not allowed"),
    "metadata": ({"__metadata__": [1]}, b"", r"__metadata__ is \[1\], not an object of strings"),
    "metadata-value": ({"__metadata__": {"a": 1}}, b"", "not an object of strings"),
    "twice": (b'{"a": 1, "a": 2}', b"", "'a' twice"),
    "entry": ({"a": 3}, b"", "tensor a: its entry is 3, not an object"),
    "unknown-dtype": ({"a": entry("I5")}, bytes(12), "tensor a: unknown dtype 'I5'"),
    "dtype-type": ({"a": entry(["F16"])}, bytes(12), r"tensor a: unknown dtype \['F16'\]"),
    "no-shape": ({"a": {"dtype": "F16", "data_offsets": [0, 2]}}, bytes(2), "shape None"),
    "negative-shape": ({"a": entry(shape=[-2, -3])}, bytes(12), r"shape \[-2, -3\] is not"),
    "float-shape": ({"a": entry(shape=[2.0, 3])}, bytes(12), r"shape \[2.0, 3\] is not"),
    "bool-shape": ({"a": entry(shape=[True, 6])}, bytes(12), r"shape \[True, 6\] is not"),
    "string-shape": ({"a": entry(shape="23")}, bytes(12), "shape '23' is not"),
    "huge-shape": ({"a": entry(shape=[2**70])}, bytes(12), "shape"),
    "no-offsets": ({"a": {"dtype": "F16", "shape": [1]}}, bytes(2), "data_offsets None"),
    "three-offsets": (
        {"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 1, 2]}},
        bytes(2),
        "data_offsets",
    ),
    "reversed": ({"a": entry(start=12, stop=0)}, bytes(12), r"data_offsets \[12, 0\]"),
    "negative-offset": ({"a": entry(start=-1, stop=11)}, bytes(12), r"data_offsets \[-1, 11\]"),
    "byte-count": ({"a": entry(stop=10)}, bytes(10), "10 bytes for F16 .2, 3., expected 12"),
    "half-byte": ({"a": entry("F4", [3], 0, 1)}, bytes(1), "1 bytes for F4 .3., expected 1.5"),
    "overlap": (
        {**TWO, "b": entry("U8", [4], 2, 6)},
        bytes(8),
        r"tensor b at offsets \[2, 6\] overlaps the bytes before it \(expected 4\)",
    ),
    "hole": ({**TWO, "b": entry("U8", [4], 6, 10)}, bytes(10), "tensor b .* leaves a hole"),
    "outside": (TWO, bytes(6), "tensor b ends at byte 8 of a data section of 6 bytes.*truncated"),
    "trailing": (TWO, bytes(9), "1 bytes after the last tensor that no tensor owns"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    header, data, message = BAD[case]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_refuses_a_file_without_room_for_a_length(size: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"{size} bytes, too short"):
        read_header(path)


@pytest.mark.parametrize("length", [100_000_001, 2**60, 2**64 - 1])
def test_refuses_an_absurd_length_without_allocating_it(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match=f"header length {length}, more than 100000000"):
        read_header(path)


def test_refuses_a_length_beyond_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", {}, length=1000)
    with pytest.raises(CheckpointError, match="header length 1000 in a file of 10 bytes"):
        read_header(path)


def test_refuses_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(position=st.integers(0, 300), value=st.integers(0, 255), keep=st.integers(0, 400))
def test_damage_never_raises_anything_else(
    position: int, value: int, keep: int, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.safetensors"
    if not whole.exists():
        save_file({f"layer.{i}": torch.zeros(i, 2) for i in range(4)}, whole)
    data = bytearray(whole.read_bytes())
    data[position % len(data)] = value
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data[:keep])
    with contextlib.suppress(CheckpointError):
        read_header(damaged)
