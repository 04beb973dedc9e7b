"""Puts one fault after another into a copy of the tree and runs the tests that must notice it.

    python scripts/mutants.py                 every fault of tests/support/faults.py
    python scripts/mutants.py zero scale      those whose description or file has one of these words

A fault is killed where its tests fail, and survives where they pass: then a test is missing. Exit
code 1 where one survives, or where tests fail without any fault. Faults of the CPU's C++ kernel are
compiled unoptimized, into a cache that goes with the copy.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from faults import FAULTS, Fault  # noqa: E402

# What takes long to import and no fault is put into; Triton reads this when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
import triton  # noqa: E402, F401

PACKAGES = {"fusedq_kernels": "kernels/fusedq_kernels", "vllm_fusedq": "vllm_fusedq"}
NATIVE = "kernels/fusedq_kernels/native/"
FAILED, PASSED = 1, 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [
        fault for fault in FAULTS if not words or any(w in fault.what + fault.file for w in words)
    ]
    with tempfile.TemporaryDirectory(prefix="fusedq-mutants-") as folder:
        tree = copied(Path(folder))
        verdicts = [verdict(tree, fault) for fault in chosen]
        print(f"{len(chosen)} faults, {verdicts.count('killed')} killed", flush=True)
        every = sorted({test for fault in chosen for test in fault.tests})
        code, said = run(tree, every, native=False)
    if code != PASSED:
        print(f"{said}\nthese tests fail without any fault")
    return int(code != PASSED or set(verdicts) != {"killed"})


def copied(folder: Path) -> Path:
    """The tracked files and those not ignored, and the packages where Python finds them first."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    tree = folder / "tree"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    # The root itself must not become importable, nor its folder `kernels`
    (folder / "site").mkdir()
    for package, place in PACKAGES.items():
        (folder / "site" / package).symlink_to(tree / place)
    return tree


def verdict(tree: Path, fault: Fault) -> str:
    """Run the tests of one fault, say what came of it, and take the fault out again."""
    file, began = tree / fault.file, time.monotonic()
    text = file.read_text()
    file.write_text(fault.put_into(text))
    try:
        code, said = run(tree, fault.tests, native=fault.file.startswith(NATIVE))
    finally:
        file.write_text(text)
    found = {FAILED: "killed", PASSED: "SURVIVED"}.get(code, f"BROKEN (exit code {code})")
    print(f"{found:9} {time.monotonic() - began:5.1f} s  {fault.file}: {fault.what}", flush=True)
    if code not in (FAILED, PASSED):
        print(said)
    return found


def run(tree: Path, tests: Sequence[str], native: bool) -> tuple[int, str]:
    """pytest's exit code, and the end of what it printed; in a fork, which has PyTorch already."""
    said = tree.parent / "said"
    child = multiprocessing.get_context("fork").Process(
        target=run_here, args=(tree, tests, native, said)
    )
    child.start()
    child.join()
    return child.exitcode or 0, said.read_text(errors="replace")[-2000:]


def run_here(tree: Path, tests: Sequence[str], native: bool, said: Path) -> None:
    """The other side of the fork."""
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    site = str(tree.parent / "site")
    os.environ |= {"PYTHONPATH": site, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path.insert(0, site)
    sys.dont_write_bytecode = True
    if native:
        os.environ |= {"CXXFLAGS": "-O0", "XDG_CACHE_HOME": str(tree.parent / "cache")}
    os.chdir(tree)
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    sys.exit(main())
