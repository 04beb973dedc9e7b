"""The interpreter that these tests speed up: it patches once a launch, and undoes all of it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def add_doubled_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x + doubled(x) + doubled(x))


def language() -> list[dict[str, object]]:
    """All that a launch replaces."""
    owners = (tl, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    return [{name: getattr(each, name) for name in dir(each)} for each in owners]


def test_one_launch_patches_the_language_once_and_restores_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patched = []
    builtin = interpreter._patch_builtin

    def counting(package, *rest):
        patched.append(package)
        return builtin(package, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", counting)
    before = language()
    x, y = torch.arange(32.0), torch.empty(32)
    for launches in (1, 2):
        add_doubled_kernel[(4,)](x, y, BLOCK=8)
        assert torch.equal(y, 5 * x)
        assert patched.count(tl) == launches
        assert language() == before
