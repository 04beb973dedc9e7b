"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

# Triton reads this when it is imported, so it is set before any test module can do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    importlib.import_module("interpreter").patch_once_per_launch()

# Launches then go through the JIT, to a GPU that is named and never reached.
DRIVER = """
import triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-cases", type=int, default=2000, help="damaged checkpoints to load")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of the damage")
    group.addoption("--fuzz-only", type=int, default=None, help="number of the only case to run")
    group = parser.getgroup("kernels")
    group.addoption("--aarch64", action="store_true", help="emulate the CPU kernel on aarch64")
    group = parser.getgroup("engines")
    group.addoption(
        "--all-models", action="store_true", help="start an engine for every kind of model"
    )


@pytest.fixture
def compiler_env() -> dict[str, str]:
    """Environment for a subprocess that compiles kernels: the interpreter replaces the compiler."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture
def compiling(compiler_env: dict[str, str]) -> Callable[..., str]:
    """`compiling(script, *arguments)`: what a Python script prints whose Triton compiles.

    With `driver` launches compile for sm_90.
    """

    def run(script: str, *arguments: str, driver: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER + script if driver else script, *arguments],
            env=compiler_env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def wna16_op() -> None:
    """Registers vLLM's CPU operator; skips where the installed vLLM is a GPU build."""
    from vllm.platforms import current_platform

    from fusedq_kernels.cpu import wna16

    if current_platform.is_cpu():
        current_platform.import_kernels()
    if not wna16.available():
        pytest.skip("the installed vLLM registers no CPU operator cpu_gemm_wna16")


@pytest.fixture
def sliced_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`sliced_rows(weight_type, group_size, n, k)`: measured rows of an sm_90 for such weights.

    Row 3 sends 65 to 128 tokens to sliced-cublas; row 2 is the fused one beside it.
    """
    from fusedq_kernels import prepared
    from fusedq_kernels.choose import tuning
    from vllm_fusedq.plan import layer

    caches = (tuning._packaged, tuning._own, prepared.prepared, layer._choose)
    tile = {"block_m": 16, "block_n": 64, "split_k": 1, "num_warps": 4, "num_stages": 3}
    rows = []

    def add(weight_type: str, group_size: int, n: int, k: int) -> None:
        shape = {"weight_type": weight_type, "group_size": group_size, "n": n, "k": k}
        fused = {"kernel": "triton-gemm", **tile, "us": 9.0}
        rows.extend(
            [
                {**shape, "max_m": 64, **fused},
                {**shape, "max_m": 128, **fused, "block_m": 64},
                {**shape, "max_m": 128, "kernel": "sliced-cublas", "us": 5.0},
            ]
        )
        table = {"triton": version("triton"), "date": "2026-01-31", "commit": "0", "rows": rows}
        path = tmp_path / "tuned" / "sm_90.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"device": "sm_90", "tables": [table]}))
        for cache in caches:
            cache.cache_clear()

    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    yield add
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what fusedq_kernels allocates with `empty`, so that an unwritten element shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "fusedq_kernels":
            tensor.fill_(torch.nan if tensor.is_floating_point() else 85)
        return tensor

    return poisoned
