"""Fixtures of the kernel tests."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

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
