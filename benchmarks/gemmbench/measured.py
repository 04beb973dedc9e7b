"""What was measured of single tiles, read from the CSV files of the experiments.

A label names a tile and what was changed in the kernel: "128x64 w4 s3 k2 scaled wait" is 128
tokens by 64 outputs, 4 warps, 3 stages, 2 splits of K, weights scaled in 16 bits, and a wait for
the tensor cores after every K block. Forms of the kernel that were not kept, rows that were wrong
by design and failures are left out.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fusedq_kernels.types import GemmShape, TileConfig

FILES = ("tiles.csv", "changes.csv", "changes-2.csv")
_TILE = re.compile(r"(\d+)x(\d+) w(\d+) s(\d+) k(\d+)(.*)")
_KERNELS = {"cublas": None, "sliced": "sliced-cublas"}
_SCALED = {"scaled", "scale_weights"}
# The shipped kernel's decoder, its wait and its order of tiles; the others were not worth it.
_KEPT = {"asm", "wait", "group8"}


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch; `kernel` None is cuBLAS on 16-bit weights. `form` names the
    changes of the kernel that `FILES` list beside the tile."""

    shape: GemmShape
    kernel: str | None
    tile: TileConfig | None
    form: frozenset[str]
    us: float
    file: str


def timings(folder: Path, files: Iterable[str] = FILES) -> Iterator[Timing]:
    """Every right answer of `files`, in their order."""
    for name in files:
        with (folder / name).open(newline="") as file:
            for row in csv.DictReader(file):
                if row["us"] and row["n"] and not row["note"] and row.get("what") != "twin":
                    yield from _timing(row, name)


def _timing(row: dict[str, str], file: str) -> Iterator[Timing]:
    shape = GemmShape(int(row["m"]), int(row["n"]), int(row["k"]))
    label = row.get("variant") or row["kernel"]
    if label in _KERNELS:
        yield Timing(shape, _KERNELS[label], None, frozenset(), float(row["us"]), file)
        return
    match = _TILE.fullmatch(label)
    if match is None:
        raise ValueError(f"{file}: no tile in {label!r}")
    block_m, block_n, num_warps, num_stages, split_k = map(int, match.groups()[:5])
    words = set(match[6].split())
    if words - _KEPT - _SCALED:
        return
    scaled = bool(words & _SCALED)
    tile = TileConfig(
        *(block_m, block_n, split_k, num_warps, num_stages),
        scale_weights=scaled,
        x_descriptor=scaled,
    )
    form = frozenset(words & _KEPT)
    yield Timing(shape, "triton-gemm", tile, form, float(row["us"]), file)


def is_right_form(timing: Timing) -> bool:
    """Whether the tile's wgmmas cannot run on into the next block's decoding, whatever the shape:
    few tokens multiply step by step, scaled weights wait."""
    if timing.kernel != "triton-gemm" or timing.tile is None:
        return False
    return "wait" in timing.form or not timing.tile.scale_weights
