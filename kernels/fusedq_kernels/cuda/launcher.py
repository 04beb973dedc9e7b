"""Launches one Triton kernel many times with the same constants.

Triton's JIT binds, specialises and hashes all arguments of every launch. What they can differ in
from one launch of a layer to the next is small: a pointer that 16 does not divide, the device. So
the kernel that the JIT has compiled is kept and called directly, as Triton's tutorials call what
`kernel.warmup` returns. Launch hooks (profilers) still run.
"""

from typing import Any

import triton
from triton.runtime import driver

from fusedq_kernels.cuda.gemm_kernel import fused_gemm_kernel

# Pointers and strides are multiples of this, which Triton's launch specialisation finds out by
# itself; without it the loads of x are narrower than a 16-byte asynchronous copy.
ALIGNMENT = 16
INTERPRETED = not isinstance(fused_gemm_kernel, triton.runtime.JITFunction)


class Launcher:
    """A kernel with its constexpr arguments and compiler options.

    Of the other arguments only numbers that are not specialised and pointers may change between
    launches, and whether a pointer is None may not. A launch with tensors of device meta compiles
    for the current device, and no more: what another launch will need can be compiled before it.
    """

    def __init__(self, kernel: Any, constants: dict[str, object], options: dict[str, object]):
        self.kernel, self.keywords = kernel, constants | options
        self.constants = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled: dict[int, Any] = {}

    def launch(self, grid: tuple[int, int, int], places: int, *arguments: object) -> None:
        """Launch on the current device and stream; `places` is the addresses of all tensors that
        the kernel is specialised for, or-ed, and 0 where they are of device meta."""
        if INTERPRETED or not places or places % ALIGNMENT:
            self._by_jit(grid, places, *arguments)
            return
        device = driver.active.get_current_device()
        compiled = self.compiled.get(device)
        if compiled is None:
            compiled = self.kernel[grid](*arguments, **self.keywords)
            # A hook may have forbidden to compile
            if compiled is not None:
                # Triton 3.9 returns the future of what another thread compiles
                whole = compiled.result() if hasattr(compiled, "result") else compiled
                self.compiled[device] = whole
            return
        stream = driver.active.get_current_stream(device)
        compiled[grid](*arguments, *self.constants, stream=stream)

    def _by_jit(self, grid: tuple[int, int, int], places: int, *arguments: object) -> None:
        if places:
            self.kernel[grid](*arguments, **self.keywords)
        elif not INTERPRETED:
            self.kernel.warmup(*arguments, grid=grid, **self.keywords)
