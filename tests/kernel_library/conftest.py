"""Fixtures of the kernel tests."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

GUARD = 256
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


@pytest.fixture
def compiling(compiler_env) -> Callable[..., str]:
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


@pytest.fixture
def ordered_dot(monkeypatch):
    """The interpreter adds the products of a dot in one order for tiles of any shape.

    As a GPU's tensor cores do; a BLAS has another order for another shape, on some CPUs.
    """

    def matmul(a, b, dtype=None):
        total = np.zeros((a.shape[0], b.shape[1]), dtype or np.result_type(a, b))
        for k in range(a.shape[1]):
            total += a[:, k, None] * b[k]
        return total

    numpy = vars(np) | {"matmul": matmul}
    monkeypatch.setattr(interpreter, "np", SimpleNamespace(**numpy))


@pytest.fixture
def guarded_empty(monkeypatch):
    """`torch.empty` yields NaN between guard bands: every element written, none beside them."""
    buffers = []

    def empty(shape, dtype, device):
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        buffer[:GUARD] = buffer[GUARD + numel :] = 7
        buffers.append(buffer)
        return buffer[GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for buffer in buffers:
        assert (buffer[:GUARD] == 7).all()
        assert (buffer[-GUARD:] == 7).all()
        assert not buffer.isnan().any()
