"""What a call asks of its tensors and what runs it, decided once for each text of a `Call`.

The operators of `ops.py` check their operands here, once per call; kernels trust them.
"""

import functools
from collections.abc import Callable

import torch

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS, Op, kernel_named
from fusedq_kernels.choose.device import device_behind
from fusedq_kernels.layouts.packing import PERM_DTYPE, TensorSpec, packed_shapes
from fusedq_kernels.types import DeviceSpec, GemmShape, TileConfig


class Prepared:
    """What one call asks of its tensors, and what runs it: decided once for each text."""

    def __init__(self, call: Call) -> None:
        self.call, self.kernel = call, kernel_named(call.kernel)
        spec, sizes = call.spec, (call.n, call.k)
        self.kernel.layout(spec.weight_type)
        if call.layout not in (known := self.kernel.layouts[spec.weight_type]):
            read = ", ".join(each.value for each in known)
            raise ValueError(f"{call.kernel} reads layout {read}, got {call.layout.value}")
        if call.policy.batch_invariant and not self.kernel.batch_invariant:
            able = ", ".join(each.name for each in KERNELS.values() if each.batch_invariant)
            raise ValueError(f"kernel {call.kernel} is not batch-invariant; supported: {able}")
        if self.kernel.op is Op.EMBEDDING and call.phase:
            raise ValueError(f"an embedding starts with whole groups, got phase {call.phase}")
        shapes = packed_shapes(call.layout, *sizes, spec, call.phase, call.dtype)
        self.n, self.in_features, self.dtype = call.n, call.in_features, call.dtype.torch
        self.qweight, self.scales = shapes["qweight"], shapes["scales"]
        self.zeros = shapes.get("zeros")
        self.perm = TensorSpec((call.k,), PERM_DTYPE)
        self.bias = TensorSpec((call.n,), self.dtype)
        self.on_cpu = self.kernel.device == "cpu"
        self.launched = functools.cache(self._launched)
        self.runs: dict[torch.device, Callable[[int], Callable[..., None]]] = {}

    def check(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        perm: torch.Tensor | None,
    ) -> None:
        """Raise ValueError, saying found and expected, for operands of another matmul."""
        if x.dtype != self.dtype:
            raise ValueError(f"x must be {self.dtype}, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape [..., {self.in_features}], got {list(x.shape)}")
        self.check_weight(x, qweight, scales, zeros, perm)
        if bias is not None:
            check_tensor("bias", bias, self.bias, x.device)

    def check_weight(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        perm: torch.Tensor | None,
    ) -> None:
        """Raise ValueError for another weight than the call's, or one that is not beside `x`."""
        device = x.device
        if self.on_cpu and x.is_cuda:
            raise ValueError(f"kernel {self.call.kernel} runs on a CPU, x is on {device}")
        check_tensor("qweight", qweight, self.qweight, device)
        check_tensor("scales", scales, self.scales, device)
        if zeros is not None or self.zeros is not None:
            check_tensor("zeros", zeros, self.zeros, device)
        if perm is not None:
            check_tensor("perm", perm, self.perm, device)
        elif self.in_features != self.call.k:
            raise ValueError(f"{self.in_features} features need a perm to {self.call.k} rows")

    def run(self, device: torch.device, tokens: int) -> Callable[..., None]:
        """What runs so many tokens on a device; `catalogue.Kernel.prepare` has its arguments."""
        chosen = self.runs.get(device)
        if chosen is None:
            chosen = self.runs[device] = self._chosen(device_behind(device, self.on_cpu))
        return chosen(tokens)

    def _launched(self, kernel: str, tile: TileConfig | None) -> Callable[..., None]:
        return KERNELS[kernel].prepare(self.call, tile)

    def _chosen(self, device: DeviceSpec) -> Callable[[int], Callable[..., None]]:
        call, kernel, launched = self.call, self.kernel, self.launched

        # A model calls with few numbers of tokens while it decodes and any while it prefills.
        @functools.lru_cache(maxsize=4096)
        def chosen(tokens: int) -> Callable[..., None]:
            shape = GemmShape(tokens, call.n, call.k)
            launch = kernel.launch(shape, call.spec, device, call.policy)
            return launched(launch.kernel, launch.tile)

        return chosen


@functools.cache
def prepared(text: str) -> Prepared:
    """What is ready for the call of that text; raises ValueError as `Call.parse` does."""
    return Prepared(Call.parse(text))


def check_tensor(
    name: str, tensor: torch.Tensor | None, expected: TensorSpec | None, device: torch.device
) -> None:
    if tensor is None or expected is None:
        found = "none" if tensor is None else "one"
        raise ValueError(f"{name} must be {'absent' if expected is None else 'given'}, got {found}")
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        raise ValueError(
            f"{name} must be {expected.dtype} {list(expected.shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like x, got {tensor.device}")


def check_out(out: torch.Tensor, x: torch.Tensor, n: int) -> None:
    """The tensor to write into, `[..., n]` for tokens x `[..., in_features]`."""
    if out.shape[-1:] != (n,) or out.shape[:-1] != x.shape[:-1] or out.dtype != x.dtype:
        raise ValueError(
            f"out must be {x.dtype} {[*x.shape[:-1], n]}, got {out.dtype} {list(out.shape)}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device} like x, got {out.device}")
