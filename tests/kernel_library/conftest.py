"""Fixtures of the kernel tests."""

import pytest
import torch

GUARD = 256


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
