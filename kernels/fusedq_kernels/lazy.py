"""`from fusedq_kernels.lazy import torch`: torch, imported where it is first used.

For modules that planning imports and whose functions handle tensors: importing torch takes about
two seconds and 200 MB, and a plan needs none of it. Such a module postpones its annotations
(`from __future__ import annotations`) and uses torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> object:
            import torch

            return getattr(torch, name)

    torch = _Torch()
