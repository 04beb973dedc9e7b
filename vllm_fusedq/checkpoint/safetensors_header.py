"""Reads what a .safetensors file says about its tensors, without reading a tensor.

A file is a header length (8 bytes, little-endian), that many bytes of JSON, then the tensors' data,
which the header has to cover without holes or overlaps: the safetensors format's own rules. Nothing
in the file is trusted before it is checked.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

from vllm_fusedq.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

# Such a file says where git-lfs keeps the real one; safetensors would read these as a length
LFS_POINTER = b"version "
LFS_WAY_OUT = (
    "a git-lfs pointer in place of the file; run `git lfs pull`, or download the model with "
    "`hf download`"
)

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}


PLAIN_DTYPES = ("BF16", "F16", "F32")
"""Of numbers that were never quantized."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the stored tensor `tensor`: in its first dimension `index`, in its second `rows`,
    first and one past the last; None where there is no second."""

    tensor: str
    index: int
    rows: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: `dtype` in safetensors' names ("I32", "BF16"), `file` the file's name.

    `start` is the place in the file of its first byte. A `piece` of another tensor is one in all
    but its name, which the file does not have.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = field(default=0, compare=False)
    piece: Piece | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be read, is truncated or breaks the format's rules.
    """
    label = str(path)
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(header_bytes(label, file.read(8), file_bytes))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_header(label, path.name, raw, file_bytes)


def header_bytes(label: str, prefix: bytes, file_bytes: int) -> int:
    """How many bytes of JSON follow the 8 bytes `prefix` of a file of `file_bytes`.

    Raises:
        CheckpointError: the file cannot hold them; `label` is its name in the message.
    """
    if len(prefix) < 8:
        _fail(label, f"{file_bytes} bytes, too short for the 8-byte header length")
    if prefix == LFS_POINTER:
        _fail(label, LFS_WAY_OUT)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _fail(label, f"header length {length}, more than {MAX_HEADER_BYTES} bytes")
    if length > file_bytes - 8:
        _fail(label, f"header length {length} in a file of {file_bytes} bytes")
    return length


def parse_header(label: str, name: str, raw: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors of the file `name` by its header `raw`, JSON alone, in the order of their bytes.

    Raises:
        CheckpointError: the header breaks the format's rules or is not of a file of this size.
    """
    entries = _parse(label, raw)
    data_start = 8 + len(raw)
    data_bytes = file_bytes - data_start
    spans = sorted(
        (_check_entry(label, name, tensor, entry, data_start) for tensor, entry in entries.items()),
        key=lambda span: (span[0], span[1]),
    )
    end = 0
    for start, stop, info in spans:
        if start != end:
            kind = "overlaps the bytes before it" if start < end else "leaves a hole before it"
            _fail(label, f"tensor {info.name} at offsets [{start}, {stop}] {kind} (expected {end})")
        if stop > data_bytes:
            _fail(
                label,
                f"tensor {info.name} ends at byte {stop} of a data section of {data_bytes} bytes: "
                "the file is truncated, download it again",
            )
        end = stop
    if end != data_bytes:
        _fail(label, f"{data_bytes - end} bytes after the last tensor that no tensor owns")
    return {info.name: info for _, _, info in spans}


def _parse(label: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, value in pairs:
            if name in names:
                _fail(label, f"the header holds {name!r} twice")
            names[name] = value
        return names

    try:
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{label}: the header is not UTF-8: {error}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        _fail(label, f"the header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _of_strings(metadata):
        _fail(label, f"__metadata__ is {metadata!r:.80}, not an object of strings")
    return header


def _refuse_constant(name: str) -> Never:
    """NaN and Infinity, which Python reads as JSON and the safetensors library does not."""
    raise ValueError(f"{name} is no JSON number")


def _of_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _check_entry(
    label: str, file: str, name: str, entry: Any, data_start: int
) -> tuple[int, int, TensorInfo]:
    """Start and stop in the data section, and the tensor."""
    if not isinstance(entry, dict):
        _fail(label, f"tensor {name}: its entry is {entry!r:.80}, not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(label, f"tensor {name}: unknown dtype {dtype!r:.80}")
    if not _naturals(shape):
        _fail(label, f"tensor {name}: shape {shape!r:.80} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(label, f"tensor {name}: data_offsets {offsets!r:.80} are not [start, stop]")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    found = offsets[1] - offsets[0]
    if bits != found * 8:
        _fail(label, f"tensor {name}: {found} bytes for {dtype} {shape}, expected {bits / 8:g}")
    info = TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0])
    return offsets[0], offsets[1], info


def _naturals(value: Any) -> bool:
    # bool is an int to isinstance, but `true` is not a size; 2**63 bounds the arithmetic below
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _fail(label: str, fact: str) -> Never:
    raise CheckpointError(f"{label}: not a usable safetensors file: {fact}")
