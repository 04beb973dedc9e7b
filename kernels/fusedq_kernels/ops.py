"""`torch.ops.fusedq`: the operators that a model calls, their checks and their fakes.

    matmul(x, qweight, scales, zeros, bias, perm, call) -> y
    matmul_out(out, x, qweight, scales, zeros, bias, perm, call)
    embedding(ids, qweight, scales, zeros, perm, call) -> rows

`call` is the text of a `Call`: the kernel is part of it, because a plan names it; nothing here
chooses or replaces one. `matmul_out` writes into a tensor of the caller's: a compiled model reuses
one buffer for many layers, where memory that is new in every call costs page faults. Importing this
module registers the operators and imports no Triton.
"""

from dataclasses import replace
from typing import Any

import torch

from fusedq_kernels.call import Call
from fusedq_kernels.prepared import Prepared, check_out, prepared
from fusedq_kernels.types import DEFAULT_POLICY, Launch, PackedWeight, Policy

_WEIGHT = "Tensor qweight, Tensor scales, Tensor? zeros"
_SCHEMAS = (
    f"matmul(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? perm, str call) -> Tensor",
    f"matmul_out(Tensor(a!) out, Tensor x, {_WEIGHT}, Tensor? bias, Tensor? perm, str call) -> ()",
    f"embedding(Tensor ids, {_WEIGHT}, Tensor? perm, str call) -> Tensor",
)


def matmul(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    kernel: str,
    policy: Policy = DEFAULT_POLICY,
) -> torch.Tensor:
    """`x @ dequantize(packed).T + bias` by the named kernel.

    A function that torch.compile traces calls `torch.ops.fusedq.matmul` with the text of its call.

    A weight with a `perm` multiplies `x[..., perm]`: the tokens are gathered once, into a copy,
    before the kernel reads them. A kernel that gathers by itself reads two bytes at a time, which
    is below the four of an asynchronous copy, and every tile of outputs would gather again; by
    pairs of four bytes it takes a third more instructions and, as the address of one load is the
    result of another, keeps one K block of the weight in flight instead of three.

    Args:
        x: `[..., in_features]` fp16 or bf16 on the device of `packed`, any strides.
        packed: a weight in a layout that `kernel` reads.
        bias: `[N]` in the dtype of `x`, or None.
        kernel: a name of `catalogue.KERNELS`; those of a GPU run on a CPU in Triton's interpreter.
        policy: batch-invariant rows of kernel triton-gemm only.

    Returns:
        y: `[..., N]`, contiguous, dtype of `x`.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the weight asks for, or a policy
            that the kernel does not have.
        RuntimeError: kernel cpu-wna16 where vLLM's CPU operator is not registered.
    """
    call = Call.of(packed, kernel, x.dtype, policy).text
    weight = (packed.qweight, packed.scales, packed.zeros)
    return torch.ops.fusedq.matmul(x, *weight, bias, packed.perm, call)


def embedding(
    ids: torch.Tensor, packed: PackedWeight, kernel: str, dtype: torch.dtype
) -> torch.Tensor:
    """`dequantize(packed)[ids]`, each value rounded once to `dtype`.

    Reads the asked rows only. An id outside of `[0, N)` gets a row of zeros: a GPU cannot refuse.
    The same resident weight serves a tied lm_head through `matmul`.

    Args:
        ids: int64 or int32, any shape, on the device of `packed`.
        packed: a weight of N rows (tokens) and K columns, phase 0, in a layout that `kernel` reads.
            With a `perm`, column `perm[k]` of the result is row k of the weight.
        kernel: a name of `catalogue.KERNELS`.
        dtype: float16 or bfloat16; that of the scales of layout CPU_WNA16.

    Returns:
        rows: `[*ids.shape, K]`, contiguous.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the weight asks for, or a layout
            that `kernel` does not read.
    """
    call = Call.of(packed, kernel, dtype).text
    weight = (packed.qweight, packed.scales, packed.zeros)
    return torch.ops.fusedq.embedding(ids, *weight, packed.perm, call)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    launch: Launch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`matmul` of tokens `[M, K]` by one launch, whatever would be chosen: to measure and to check.

    The gather of activation reordering is the operator's, so a `perm` is not followed. Raises as
    `matmul` does.
    """
    call = replace(Call.of(packed, launch.kernel, x.dtype), in_features=packed.k)
    ready, weight = prepared(call.text), (packed.qweight, packed.scales, packed.zeros)
    ready.check(x, *weight, bias, None)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [M, {packed.k}], got {list(x.shape)}")
    launched = ready.launched(launch.kernel, launch.tile)
    y = torch.empty((x.shape[0], packed.n), dtype=x.dtype, device=x.device) if out is None else out
    check_out(y, x, packed.n)
    if x.shape[0]:
        x = x if x.stride(1) == 1 else x.contiguous()
        launched(x, *weight, bias, y)
    return y


def _multiply(
    ready: Prepared,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if x.ndim != 2:
        x, out = x.reshape(-1, ready.in_features), out.view(-1, ready.n)
    tokens = x.shape[0]
    if tokens == 0:
        return
    if perm is not None:
        x = x.index_select(1, perm)
    elif x.stride(1) != 1:
        x = x.contiguous()
    ready.run(x.device, tokens)(x, qweight, scales, zeros, bias, out)


def _matmul(x: torch.Tensor, *weight_and_call: Any) -> torch.Tensor:
    *weight, call = weight_and_call
    ready = prepared(call)
    ready.check(x, *weight)
    out = x.new_empty((*x.shape[:-1], ready.n))
    _multiply(ready, x, *weight, out)
    return out


def _matmul_out(out: torch.Tensor, x: torch.Tensor, *weight_and_call: Any) -> None:
    *weight, call = weight_and_call
    ready = prepared(call)
    ready.check(x, *weight)
    check_out(out, x, ready.n)
    _multiply(ready, x, *weight, out)


def _matmul_fake(x: torch.Tensor, *weight_and_call: Any) -> torch.Tensor:
    *weight, call = weight_and_call
    ready = prepared(call)
    ready.check(x, *weight)
    return x.new_empty((*x.shape[:-1], ready.n))


def _matmul_out_fake(out: torch.Tensor, x: torch.Tensor, *weight_and_call: Any) -> None:
    *weight, call = weight_and_call
    ready = prepared(call)
    ready.check(x, *weight)
    check_out(out, x, ready.n)


def _checked_ids(ids: torch.Tensor, *weight_and_call: Any) -> Prepared:
    *weight, call = weight_and_call
    ready = prepared(call)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, got {ids.dtype}")
    ready.check_weight(ids, *weight)
    return ready


def _embedding(ids: torch.Tensor, *weight_and_call: Any) -> torch.Tensor:
    ready = _checked_ids(ids, *weight_and_call)
    rows = ids.reshape(-1).long()
    out = torch.empty((rows.shape[0], ready.call.k), dtype=ready.dtype, device=ids.device)
    if rows.shape[0]:
        ready.run(ids.device, rows.shape[0])(rows.contiguous(), *weight_and_call[:-1], out)
    return out.view(*ids.shape, ready.call.k)


def _embedding_fake(ids: torch.Tensor, *weight_and_call: Any) -> torch.Tensor:
    ready = _checked_ids(ids, *weight_and_call)
    return ids.new_empty((*ids.shape, ready.call.k), dtype=ready.dtype)


_IMPLEMENTATIONS = {
    "matmul": (_matmul, _matmul_fake),
    "matmul_out": (_matmul_out, _matmul_out_fake),
    "embedding": (_embedding, _embedding_fake),
}

if not hasattr(torch.ops.fusedq, "matmul"):
    # Held by the module: the operators go away with their Library.
    _LIBRARY = torch.library.Library("fusedq", "FRAGMENT")
    for _schema in _SCHEMAS:
        _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _name, (_real, _fake) in _IMPLEMENTATIONS.items():
        for _key in ("CPU", "CUDA"):
            _LIBRARY.impl(_name, _real, _key)
        torch.library.register_fake(f"fusedq::{_name}", _fake, lib=_LIBRARY)
