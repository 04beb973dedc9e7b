"""How long `fusedq check` takes and how much memory, in fresh processes.

    python benchmarks/bench_check.py MODEL --csv benchmarks/results/cpu/check.csv

Runs the command as a user does, with all files in the page cache ("warm"), and after the files of
Python's modules and of the checkpoint were dropped from it ("cold", as far as a user can).
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import json, sys
from vllm_fusedq.cli import app
try:
    app()
finally:
    status = open("/proc/self/status").read()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    files = [each.__file__ for each in sys.modules.values() if getattr(each, "__file__", None)]
    print(json.dumps([peak, files]), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sizes", default="8,16", help="tensor-parallel sizes")
    parser.add_argument("--device", default="h200")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    options = [str(args.model), "-tp", args.sizes, "--device", args.device]
    _, _, modules = run(options)
    dropped = [*args.model.iterdir(), *modules]
    rows = []
    for cache in ("warm", "cold"):
        seconds, peaks = [], []
        for _ in range(args.repeats):
            if cache == "cold":
                drop(dropped)
            elapsed, peak, _ = run(options)
            seconds.append(elapsed)
            peaks.append(peak)
        times = (statistics.median(seconds), min(seconds), max(seconds))
        rows.append([cache, args.repeats, *(f"{each:.3f}" for each in times), max(peaks) // 10**6])
        print(f"{cache}: median {times[0]:.2f} s, peak {max(peaks) / 1e6:.0f} MB")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["cache", "runs", "median_s", "min_s", "max_s", "peak_mb"])
            writer.writerows(rows)


def run(options: list[str]) -> tuple[float, int, list[Path]]:
    """Seconds and peak bytes of one process, and the files that it imported."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "check", *options], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    peak, files = json.loads(done.stderr.splitlines()[-1])
    return seconds, peak, [Path(file) for file in files]


def drop(files: list[Path]) -> None:
    """Forget files in the page cache, and what Python compiled of them."""
    for file in files:
        for each in (file, *file.parent.glob(f"__pycache__/{file.stem}.*")):
            if each.is_file():
                descriptor = os.open(each, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


if __name__ == "__main__":
    main()
