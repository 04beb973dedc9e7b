"""The audit of all that can be launched on one architecture: one table, one line per binary.

    python -m fusedq_kernels.audit --target sm_90 --everything --csv sm_90-triton-3.9.0.csv

Compiles on all cores, writes each line as it comes and takes up where it was stopped: lines of this
Triton and these sources count as done, others are dropped. Lines come in an order that is spread
over all, so that an unfinished table is a sample, as `--share` asks for. Beside the main kernel
stand the dequantizing half of the sliced one and the gather, which multiply nothing; or, with
`--of experts`, there is the main kernel for experts alone.
"""

import csv
import hashlib
import itertools
import multiprocessing
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fusedq_kernels.audit import experts
from fusedq_kernels.audit.compile import (
    AUDIT_K,
    audited_groups,
    pointer_types,
    scheme_cells,
)
from fusedq_kernels.audit.fused import Variant, audit_tile
from fusedq_kernels.audit.gather import audit_lookup
from fusedq_kernels.audit.rows import CompiledRow, tile_name
from fusedq_kernels.audit.slices import audit_slice
from fusedq_kernels.audit.variants import launchable, specs
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.routed import Routed
from fusedq_kernels.types import DeviceSpec, QuantSpec, TileConfig

_COLUMNS: dict[str, Callable[..., object]] = {
    "regs": lambda row: row.registers,
    "stack": lambda row: row.stack,
    "smem": lambda row: row.smem,
    "mma": lambda row: row.mma,
    "loop": lambda row: getattr(row, "loop_instructions", ""),
    "local": lambda row: row.local,
    "running": lambda row: getattr(row, "running", ""),
    "hazards": lambda row: row.hazards,
    "problems": lambda row: ", ".join(row.problems) or "none",
}
_FIELDS = ("triton", "sources", "kernel", "variant", *_COLUMNS)


class Share(NamedTuple):
    """Share `number`, from 1 on, of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "2/8"; ValueError for anything else."""
        number, _, count = text.partition("/")
        share = cls(int(number), int(count))
        if not 1 <= share.number <= share.count:
            raise ValueError(f"a share is 1/8 to 8/8, for example, got {text!r}")
        return share

    def holds(self, name: str) -> bool:
        return zlib.crc32(name.encode()) % self.count == self.number - 1


@dataclass(frozen=True, slots=True)
class Job:
    """A binary to audit: `audit(target, *arguments)`, by a name that tells it from all others."""

    kernel: str
    name: str
    audit: Callable[..., CompiledRow]
    arguments: tuple[object, ...]


def jobs(device: DeviceSpec) -> Iterator[Job]:
    """All of an architecture, but for experts."""
    for each in launchable(device):
        yield _of_variant(each)
    for scheme in _schemes(device):
        yield Job("sliced-cublas", _scheme(*scheme), audit_slice, scheme)
        for has_perm, suffix in ((False, ""), (True, " perm")):
            yield Job("triton-gather", _scheme(*scheme) + suffix, audit_lookup, (*scheme, has_perm))


def expert_jobs(device: DeviceSpec) -> Iterator[Job]:
    """All for experts on an architecture."""
    return map(_of_variant, experts.launchable(device))


JOBS = {"weights": jobs, "experts": expert_jobs}


def _of_variant(each: Variant) -> Job:
    arguments = (each.tile, each.spec, each.act_dtype, each.has_bias, each.routed)
    return Job("triton-gemm", name_of(each), audit_tile, arguments)


def _schemes(device: DeviceSpec) -> Iterable[tuple[QuantSpec, torch.dtype]]:
    """Those for which the kernels without a tile are compiled; of equal ones the first."""
    found: dict[object, tuple[QuantSpec, torch.dtype]] = {}
    for spec, act_dtype in itertools.product(specs(device), gemm.ACT_DTYPES):
        constants = gemm.weight_constants(spec, audited_groups(spec))
        pointers = pointer_types(spec, act_dtype)
        key = (frozenset(constants.items()), frozenset(pointers.items()))
        found.setdefault(key, (spec, act_dtype))
    return found.values()


def name_of(variant: Variant) -> str:
    """ "uint4b8 bf16 scale=fp16 g128 256x128s w8 s3 k1 x_descriptor bias"."""
    tile = variant.tile
    flags = [
        field.name
        for field in fields(TileConfig)
        if field.type is bool and field.name != "scale_weights" and getattr(tile, field.name)
    ]
    parts = [tile_name(tile), f"w{tile.num_warps}", f"s{tile.num_stages}", f"k{tile.split_k}"]
    parts += [f"segments={tile.segments}"] if tile.segments > 1 else []
    parts += [*flags, "bias"] if variant.has_bias else flags
    return " ".join((_scheme(variant.spec, variant.act_dtype), *parts, *_way(variant.routed)))


def _way(routed: Routed) -> list[str]:
    """["up", "top_k=2", "silu"], and nothing without experts."""
    if not routed.top_k:
        return []
    own = routed.activation
    words = ["up" if routed.y_sorted else "down", f"top_k={routed.top_k}"]
    words += [name for name in ("alone", "x_sorted") if getattr(routed, name)]
    words += [own.name] if own is not None else []
    return words + (["limit"] if own is not None and own.limit is not None else [])


def _scheme(spec: QuantSpec, act_dtype: torch.dtype) -> str:
    cells = scheme_cells(spec, act_dtype)
    groups = "channel" if spec.group_size >= AUDIT_K else f"g{spec.group_size}"
    return f"{cells['weight_type']} {cells['act_dtype']} scale={cells['scale_dtype']} {groups}"


def run(target: str, path: Path, share: Share, num_processes: int, of: str = "weights") -> int:
    """Audit a share of all `JOBS[of]` into a table; 1 where any line of it has a problem."""
    stamp = {"triton": triton.__version__, "sources": sources()}
    wanted = {
        (job.kernel, job.name): job
        for job in JOBS[of](device_by_name(target))
        if share.holds(f"{job.kernel} {job.name}")
    }
    lines = [
        line
        for line in _read(path)
        if stamp.items() <= line.items() and (line["kernel"], line["variant"]) in wanted
    ]
    done = {(line["kernel"], line["variant"]) for line in lines}
    missing = sorted(
        (job for key, job in wanted.items() if key not in done),
        key=lambda job: zlib.crc32(f"{job.name} {job.kernel}".encode()),
    )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        for cells in _audited(target, missing, num_processes):
            lines.append(stamp | cells)
            writer.writerow(lines[-1])
            file.flush()
    bad = [line for line in lines if line["problems"] != "none"]
    for line in bad:
        print(f"{line['kernel']} {line['variant']}: {line['problems']}")
    touched = sum(line["hazards"] != "0" for line in lines)
    print(
        f"triton {triton.__version__}, {target}: {len(lines)} binaries, {len(bad)} with a problem, "
        f"{touched} with registers touched under a running wgmma"
    )
    return 1 if bad else 0


def sources() -> str:
    """Eight digits that change with the kernels and with what the audit sees in them."""
    package = Path(gemm.__file__).parent.parent
    files = sorted(file for room in ("audit", "cuda") for file in (package / room).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if None not in line.values()]


def _audited(target: str, missing: Iterable[Job], num_processes: int) -> Iterator[dict[str, str]]:
    """The cells of each line, in the order in which they are done."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        spawn.Pool(num_processes, _forget_binaries, (cache,)) as pool,
    ):
        yield from pool.imap_unordered(_cells, ((target, job) for job in missing))


def _forget_binaries(cache: str) -> None:
    """Thousands of them are of no use to anybody later."""
    os.environ["TRITON_CACHE_DIR"] = cache


def _cells(task: tuple[str, Job]) -> dict[str, str]:
    target, job = task
    row = job.audit(target, *job.arguments)
    cells = {name: str(cell(row)) for name, cell in _COLUMNS.items()}
    return {"kernel": job.kernel, "variant": job.name, **cells}
