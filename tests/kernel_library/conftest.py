"""Fixtures of the kernel tests."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

GUARD = 256


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
