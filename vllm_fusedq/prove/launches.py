"""Runs every launch of a layer: compiled before it serves, and compared with plain PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusedq_kernels import guard, warmup
from fusedq_kernels.catalogue import Kernel
from fusedq_kernels.types import PackedWeight
from fusedq_kernels.warmup import Reached
from vllm_fusedq.errors import KernelError
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.uses import Use


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer's resident weight, the uses that its plan names, and whether it adds a bias."""

    name: str
    packed: PackedWeight
    uses: tuple[Use, ...]
    has_bias: bool

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Each kernel that runs this weight, once."""
        return tuple(use.kernel for use in self.uses)

    @property
    def kind(self) -> object:
        """Layers of one kind share every launch."""
        packed = self.packed
        return (
            packed.spec,
            packed.n,
            packed.k,
            packed.phase,
            packed.perm is None,
            tuple(kernel.name for kernel in self.kernels),
            self.has_bias,
        )

    def truth(self, target: Target) -> guard.Truth:
        """What its launches are compared with; the same for every policy."""
        return guard.Truth.of(self.packed, target.act_dtype.torch)

    def launches(self, target: Target, max_tokens: int) -> Iterator[tuple[Kernel, Reached]]:
        """What 1 to `max_tokens` tokens reach."""
        for kernel in self.kernels:
            reached = warmup.reachable(
                kernel,
                self.packed,
                target.device,
                max_tokens,
                # A row-parallel layer adds its bias on the first rank only.
                with_bias={False, self.has_bias},
                policy=target.policy,
            )
            yield from ((kernel, each) for each in reached)


def on_gpu(packed: PackedWeight) -> bool:
    """Whether its launches are compiled for this machine, and so may be wrong on it alone."""
    return packed.qweight.is_cuda


def run_launches(
    layer: LoadedLayer, target: Target, max_tokens: int, truth: guard.Truth | None = None
) -> int:
    """Run every launch of a layer, each compared with the layer's `truth` or else on zeros.

    Returns:
        How many there were.

    Raises:
        KernelError: a launch does not run here, or gives something else than PyTorch.
    """
    act_dtype, count = target.act_dtype.torch, 0
    for kernel, reached in layer.launches(target, max_tokens):
        found = None
        try:
            if truth is None:
                warmup.run_once(reached, kernel, layer.packed, act_dtype)
            else:
                found = guard.check(reached, kernel, layer.packed, truth)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _does_not_run(layer, target, reached, error) from error
        if found is not None:
            raise _is_wrong(layer, target, found)
        count += 1
    return count


def _does_not_run(
    layer: LoadedLayer, target: Target, reached: Reached, error: Exception
) -> KernelError:
    return KernelError(
        f"{_where(layer)}: found that {reached} does not run on {_here(target)} "
        f"({type(error).__name__}: {str(error)[:500]}); supported: launches that compile and run; "
        f"{_WAY_OUT}"
    )


def _is_wrong(layer: LoadedLayer, target: Target, found: guard.Difference) -> KernelError:
    return KernelError(
        f"{_where(layer)}: found that {found.reached} is wrong on {_here(target)}: {found}; "
        f"supported: what plain PyTorch computes in float64, within rounding; {_WAY_OUT}"
    )


def _where(layer: LoadedLayer) -> str:
    packed = layer.packed
    spec = packed.spec
    return (
        f"{layer.name} ({spec.weight_type.value}, groups of {spec.group_size}, "
        f"[{packed.n}, {packed.k}] out_features x in_features per rank)"
    )


def _here(target: Target) -> str:
    import triton

    return f"{target.device.name} with Triton {triton.__version__}, activations {target.act_dtype}"


_WAY_OUT = (
    "install another Triton (with another vLLM) or serve without --quantization fusedq, and report "
    "this message"
)
