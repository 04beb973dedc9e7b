"""What decoding costs inside a fused kernel: the kernel alone, beside itself without decoding.

Without decoding it reads the same bytes and multiplies as often, but by the packed words as they
lie in memory: its answers are wrong by design, only its time means something. What decoding that
hides behind the reading takes, costs nothing and is not counted.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import CPU_FUSED, KERNELS, TRITON_GEMM
from fusedq_kernels.native.build import forget, library
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import Launch, PackedWeight
from vllm_fusedq.measure.contenders import Contender, Run
from vllm_fusedq.measure.random_weights import random_tokens

ALONE, UNDECODED = "kernel alone", "kernel without decoding"
HEADER = Path(__file__).with_name("undecoded.h")
Multiply = Callable[..., None]


def without_decoding(
    call: Call, launch: Launch, weights: Sequence[PackedWeight], tokens: int
) -> tuple[Contender, ...]:
    """The kernel that serves so many tokens, called bare, and the same without decoding.

    Nothing where another kernel than cpu-fused or triton-gemm serves them. The rows of a weight
    that is reordered get tokens in order.

    Raises:
        BuildError: cpu-fused without decoding cannot be compiled; the first time takes a minute.
    """
    if launch.kernel not in _WITHOUT:
        return ()
    multiply = {
        ALONE: KERNELS[launch.kernel].prepare(call, launch.tile),
        UNDECODED: _WITHOUT[launch.kernel](call, launch),
    }
    x = random_tokens(tokens, call.k, call.dtype.torch, weights[0].qweight.device)
    size = sum(each.nbytes for each in _tensors(weights[0]) if each is not None)
    return tuple(
        Contender(name, [_run(each, x, weight) for weight in weights], size)
        for name, each in multiply.items()
    )


def _run(multiply: Multiply, x: torch.Tensor, weight: PackedWeight) -> Run:
    tensors = _tensors(weight)
    return lambda _, out: multiply(x, *tensors, None, out)


def _tensors(weight: PackedWeight) -> tuple[torch.Tensor | None, ...]:
    return weight.qweight, weight.scales, weight.zeros


def _cpu_fused(call: Call, launch: Launch) -> Multiply:
    from fusedq_kernels.cpu.fused import arguments

    numbers, codebook = arguments(call.layout, call.spec, call.k, call.phase, call.dtype)
    operator = load()

    def run(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: None,
        bias: None,
        out: torch.Tensor,
    ) -> None:
        operator(out, x, qweight, scales, None, None, numbers, codebook)

    return run


@cache
def load() -> Multiply:
    """cpu-fused without decoding, compiled into the user's cache where it is not there.

    Raises:
        BuildError: it cannot be.
    """
    isa = this_isa()
    path = library(isa, HEADER)
    torch.ops.load_library(str(path))
    forget(path)
    return getattr(torch.ops.fusedq_undecoded, isa.operator).default


def _triton_gemm(call: Call, launch: Launch) -> Multiply:
    from vllm_fusedq.measure.undecoded_triton import decoding, words_as_values

    with decoding({call.spec.weight_type: words_as_values}):
        return TRITON_GEMM.prepare(call, launch.tile)


_WITHOUT = {CPU_FUSED.name: _cpu_fused, TRITON_GEMM.name: _triton_gemm}
