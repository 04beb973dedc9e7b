"""The CSV files of the kernel benchmarks: comment lines say what each run was, rows what it found.

Rows of one problem (`Problem`) are measured and appended together, so that a ratio never crosses
two runs and a run that was stopped goes on where it ended.
"""

import csv
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("kernels", "vllm_fusedq", "benchmarks")
COLUMNS = (
    *("run", "weight_type", "group_size", "act_dtype", "n", "k", "m", "layers"),
    *("kernel", "version", "us", "iqr_us", "tflops", "weight_gbs", "pct_twin", "vs_cublas"),
    *("dram_mb", "rms_error", "model_us", "model_limit", "detail"),
)


class Problem(NamedTuple):
    """What rows have in common that are measured together."""

    weight_type: str
    group_size: int
    act_dtype: str
    n: int
    k: int
    m: int


Row = dict[str, object]


def problem_of(row: Mapping[str, str]) -> Problem:
    """The problem that a row of a file is about."""
    sizes = (int(row[name]) for name in ("n", "k", "m"))
    return Problem(row["weight_type"], int(row["group_size"]), row["act_dtype"], *sizes)


class ResultFile:
    """An append-only CSV file; every run that writes to it first says what it is."""

    def __init__(self, path: Path, columns: Iterable[str] = COLUMNS) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.run = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._described = False

    def rows(self) -> list[dict[str, str]]:
        """Every row of every run."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(_without_comments(file)))

    def finished(self) -> set[Problem]:
        """Problems that need no measuring again."""
        return {problem_of(row) for row in self.rows()}

    def runs(self) -> dict[str, dict[str, str]]:
        """What each run says of itself, by its name."""
        found: dict[str, dict[str, str]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                name, _, value = line.removeprefix("# ").partition(": ")
                if line.startswith("# run: "):
                    found[value] = header = {}
                elif line.startswith("# "):
                    header[name] = value
        return found

    def append(self, rows: Iterable[Row], header: dict[str, object]) -> None:
        """Write rows at once; the first time also what run this is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            if not self._described:
                described = {"run": self.run, **header}
                file.writelines(f"# {name}: {value}\n" for name, value in described.items())
                self._described = True
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows({**row, "run": self.run} for row in rows)
            file.flush()
            os.fsync(file.fileno())


def results_folder(device: str, dry_run: bool) -> Path:
    """Where results of a device belong, by its name; those of a dry run belong nowhere."""
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="fusedq-dry-run-"))
    return RESULTS / device


def _without_comments(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if not line.startswith("#"))


def environment(device: torch.device) -> dict[str, object]:
    """Versions, device, clocks as found, commit and command, for the head of a result file."""
    found: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["clocks"] = _nvidia_smi()
    return found


def device_name(device: torch.device) -> str:
    """What the driver or the platform calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, Triton's interpreter: times mean nothing"


def commit() -> str:
    """Short hash of the checked-out commit; where files differ from it, or there is no repository,
    with a hash of the sources behind it."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", ROOT, *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return f"tree-{_sources_hash()}"
    return head + (f"+{_sources_hash()}" if changes else "")


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _nvidia_smi() -> str:
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvidia-smi: {error}"
    return f"{query}: {done.stdout.strip().splitlines()[0]}"
