"""`torch.ops.fusedq.matmul`: the one operator that a model calls, and its fake.

The kernel is an argument, because a plan names it; nothing here chooses or replaces one.
`operands.py` checks what it is given, `choose/` chooses a kernel's tile, `cpu/` and `launchers.py`
do the work. Importing this module registers the operator and imports no Triton.

`matmul_out` is the same operator writing into a tensor of the caller's: a compiled model reuses one
buffer for many layers, where memory that is new in every call costs page faults.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusedq_kernels.cpu import kernels
from fusedq_kernels.layouts.packing import TensorSpec, packed_shapes
from fusedq_kernels.operands import check_operands, check_out, scheme
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    KernelName,
    Launch,
    Layout,
    PackedWeight,
    QuantSpec,
    layout_for,
)

_ARGUMENTS = (
    "Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? perm, int n, "
    "int k, int in_features, int group_size, int phase, str weight_type, str scale_dtype, "
    "str kernel, bool batch_invariant=False, bool sliced_prefill=False"
)
_SCHEMAS = (
    f"matmul({_ARGUMENTS}) -> Tensor",
    f"matmul_out(Tensor(a!) out, {_ARGUMENTS}) -> ()",
)
# Tokens [M, K], weight, bias, out [M, N].
Runner = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, torch.Tensor], object]


def matmul(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    kernel: KernelName,
    batch_invariant: bool = False,
    sliced_prefill: bool = False,
) -> torch.Tensor:
    """`x @ dequantize(packed).T + bias` by the named kernel.

    A weight with a `perm` multiplies `x[..., perm]`: the tokens are gathered once, into a copy,
    before the kernel reads them. A kernel that gathers by itself reads two bytes at a time, which
    is below the four of an asynchronous copy, and every tile of outputs would gather again; by
    pairs of four bytes it takes a third more instructions and, as the address of one load is the
    result of another, keeps one K block of the weight in flight instead of three.

    Args:
        x: `[..., K]` fp16 or bf16 on the device of `packed`, any strides; `[..., in_features]` for
            a weight with a `perm`.
        packed: a weight in the layout that `kernel` reads.
        bias: `[N]` in the dtype of `x`, or None.
        kernel: a GPU runs triton-gemm and sliced-cublas; a CPU runs the other two, and those of a
            GPU in Triton's interpreter.
        batch_invariant: each row gets the same bits in any batch; kernel triton-gemm only.
        sliced_prefill: whether measured rows may replace triton-gemm by sliced-cublas, which the
            caller has to have declared.

    Returns:
        y: `[..., N]`, contiguous, dtype of `x`.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the weight asks for, or
            `batch_invariant` of another kernel.
        RuntimeError: kernel cpu-wna16 where vLLM's CPU operator is not registered.
    """
    spec = packed.spec
    return torch.ops.fusedq.matmul(
        x,
        packed.qweight,
        packed.scales,
        packed.zeros,
        bias,
        packed.perm,
        packed.n,
        packed.k,
        packed.k if packed.perm is None else packed.in_features,
        spec.group_size,
        packed.phase,
        spec.weight_type.value,
        spec.scale_dtype.value,
        kernel.value,
        batch_invariant,
        sliced_prefill,
    )


def _run_selected(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    batch_invariant: bool = False,
    sliced_prefill: bool = False,
) -> None:
    from fusedq_kernels import launchers

    problem = (x.shape[0], packed.n, packed.k, packed.spec, x.device)
    launchers.run(x, packed, bias, _launch(*problem, batch_invariant, sliced_prefill), out)


def _run_sliced(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    from fusedq_kernels import launchers

    launchers.run(x, packed, bias, Launch(KernelName.SLICED_CUBLAS, None, "by name"), out)


# A model calls with few numbers of tokens while it decodes and with any while it prefills.
@functools.lru_cache(maxsize=4096)
def _launch(
    m: int,
    n: int,
    k: int,
    spec: QuantSpec,
    device: torch.device,
    batch_invariant: bool,
    sliced_prefill: bool,
) -> Launch:
    from fusedq_kernels.choose.heuristics import select

    return select(
        *(GemmShape(m, n, k), spec, _gpu(device)),
        batch_invariant=batch_invariant,
        sliced_prefill=sliced_prefill,
    )


def _run_wna16(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    kernels.wna16_gemm(x, packed, bias, kernels.wna16_isa(x.dtype), out)


_RUNNERS: dict[KernelName, Runner] = {
    KernelName.TRITON_GEMM: _run_selected,
    KernelName.SLICED_CUBLAS: _run_sliced,
    KernelName.CPU_WNA16: _run_wna16,
    KernelName.CPU_STRIPED: kernels.striped_gemm,
}
_BATCH_INVARIANT_RUNNERS: dict[KernelName, Runner] = {
    KernelName.TRITON_GEMM: functools.partial(_run_selected, batch_invariant=True)
}
_SLICING_RUNNERS: dict[KernelName, Runner] = _RUNNERS | {
    KernelName.TRITON_GEMM: functools.partial(_run_selected, sliced_prefill=True)
}
_CPU_ONLY = frozenset({KernelName.CPU_WNA16, KernelName.CPU_STRIPED})


@functools.cache
def _gpu(device: torch.device) -> DeviceSpec:
    from fusedq_kernels.choose.device import current_device, device_by_name

    # On CPU tensors Triton runs in its interpreter, which stands in for a GPU and needs a tile.
    return device_by_name("sm_90") if device.type == "cpu" else current_device(device, False)


def _matmul(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    call, packed, bias = _checked(x, *arguments)
    out = x.new_empty((*x.shape[:-1], packed.n))
    _multiply(x, packed, bias, call.run, out)
    return out


def _matmul_out(out: torch.Tensor, x: torch.Tensor, *arguments: Any) -> None:
    call, packed, bias = _checked(x, *arguments)
    check_out(out, x, packed.n)
    _multiply(x, packed, bias, call.run, out)


def _matmul_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    _, packed, _ = _checked(x, *arguments)
    return x.new_empty((*x.shape[:-1], packed.n))


def _matmul_out_fake(out: torch.Tensor, x: torch.Tensor, *arguments: Any) -> None:
    _, packed, _ = _checked(x, *arguments)
    check_out(out, x, packed.n)


def _multiply(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    run: Runner,
    out: torch.Tensor,
) -> None:
    if x.ndim != 2:
        x, out = x.reshape(-1, packed.in_features), out.view(-1, packed.n)
    if x.shape[0] == 0:
        return
    if packed.perm is not None:
        x = x.index_select(1, packed.perm)
    elif x.stride(1) != 1:
        x = x.contiguous()
    run(x, packed, bias, out)


def _checked(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    n: int,
    k: int,
    in_features: int,
    group_size: int,
    phase: int,
    weight_type: str,
    scale_dtype: str,
    kernel: str,
    batch_invariant: bool = False,
    sliced_prefill: bool = False,
) -> tuple["_Call", PackedWeight, torch.Tensor | None]:
    call = _call(
        *(n, k, group_size, phase, weight_type, scale_dtype, kernel, x.dtype),
        *(batch_invariant, sliced_prefill),
    )
    packed = PackedWeight(
        qweight, scales, zeros, call.layout, call.spec, n, k, phase, perm, in_features
    )
    if x.is_cuda and call.kernel in _CPU_ONLY:
        raise ValueError(f"kernel {kernel} runs on a CPU, x is on {x.device}")
    check_operands(x, packed, bias, call.expected)
    return call, packed, bias


class _Call(NamedTuple):
    kernel: KernelName
    run: Runner
    layout: Layout
    spec: QuantSpec
    expected: dict[str, TensorSpec]


# Keyed by plain values: hashing an Enum or a dataclass costs more than the rest of a call.
@functools.cache
def _call(
    n: int,
    k: int,
    group_size: int,
    phase: int,
    weight_type: str,
    scale_dtype: str,
    kernel: str,
    act_dtype: torch.dtype,
    batch_invariant: bool,
    sliced_prefill: bool,
) -> _Call:
    if act_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x must be float16 or bfloat16, got {act_dtype}")
    spec = scheme(weight_type, group_size, scale_dtype)
    name = KernelName(kernel)
    runners = _SLICING_RUNNERS if sliced_prefill else _RUNNERS
    if batch_invariant:
        runners = _BATCH_INVARIANT_RUNNERS
    if name not in runners:
        known = ", ".join(each.value for each in runners)
        raise ValueError(f"kernel {kernel} is not batch-invariant; supported: {known}")
    layout = layout_for(name, spec.weight_type)
    expected = packed_shapes(layout, n, k, spec, phase, act_dtype)
    expected["bias"] = TensorSpec((n,), act_dtype)
    return _Call(name, runners[name], layout, spec, expected)


if not hasattr(torch.ops.fusedq, "matmul"):
    # Held by the module: the operator goes away with its Library.
    _LIBRARY = torch.library.Library("fusedq", "FRAGMENT")
    for _schema in _SCHEMAS:
        _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl("matmul", _matmul, _key)
        _LIBRARY.impl("matmul_out", _matmul_out, _key)
    torch.library.register_fake("fusedq::matmul", _matmul_fake, lib=_LIBRARY)
    torch.library.register_fake("fusedq::matmul_out", _matmul_out_fake, lib=_LIBRARY)
