"""Runs every launch of a layer: compiled before it serves, and compared with plain PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusedq_kernels import guard, guard_experts, warmup
from fusedq_kernels.catalogue import Kernel
from fusedq_kernels.choose.own_rows import own_file
from fusedq_kernels.choose.tuned_file import YOURS
from fusedq_kernels.experts import ResidentExperts
from fusedq_kernels.types import PackedWeight, Policy
from fusedq_kernels.warmup import Reached, ReachedExperts
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

    def run_once(self, kernel: Kernel, reached: Reached, target: Target) -> None:
        """Run a launch on zeros."""
        warmup.run_once(reached, kernel, self.packed, target.act_dtype.torch)

    def compare(
        self, kernel: Kernel, reached: Reached, target: Target, truth: guard.Truth
    ) -> guard.Difference | None:
        """How a launch differs from the `truth`; None where it does not."""
        return guard.check(reached, kernel, self.packed, truth)

    def __str__(self) -> str:
        return f"{self.name} ({_told(self.packed)})"


@dataclass(frozen=True, slots=True)
class LoadedExperts:
    """The experts of a layer, and how many tokens of all ranks together they get at most; None
    where they are those of this rank alone."""

    name: str
    resident: ResidentExperts
    max_tokens: int | None = None

    @property
    def packed(self) -> PackedWeight:
        """One of the weights."""
        return self.resident.first()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (self.resident.kernel,)

    @property
    def kind(self) -> object:
        """Layers of one kind share every launch."""
        resident = self.resident
        given = (tuple(t is None for t in stack) for stack in (resident.w13, resident.w2))
        return resident.call, resident.top_k, resident.places, self.max_tokens, *given

    def truth(self, target: Target) -> tuple[guard_experts.Truth, ...]:
        """What its launches are compared with; the same for every policy."""
        return guard_experts.truths(self.resident)

    def launches(self, target: Target, max_tokens: int) -> Iterator[tuple[Kernel, ReachedExperts]]:
        """What 1 to `max_tokens` tokens reach."""
        most = max_tokens if self.max_tokens is None else self.max_tokens
        reached = warmup.reachable_experts(self._under(target.policy), target.device, most)
        yield from ((self.resident.kernel, each) for each in reached)

    def run_once(self, kernel: Kernel, reached: ReachedExperts, target: Target) -> None:
        """Run a launch on zeros."""
        warmup.run_experts_once(reached, self._under(target.policy))

    def compare(
        self,
        kernel: Kernel,
        reached: ReachedExperts,
        target: Target,
        truth: tuple[guard_experts.Truth, ...],
    ) -> guard.Difference | None:
        """How a launch differs from the `truth`; None where it does not."""
        return guard_experts.check(reached, self._under(target.policy), truth)

    def _under(self, policy: Policy) -> ResidentExperts:
        call = self.resident.call
        up, down = (replace(each, policy=policy) for each in (call.up, call.down))
        return replace(self.resident, call=replace(call, up=up, down=down))

    def __str__(self) -> str:
        up, down = self.resident.expert(0)
        count = self.resident.call.count
        return f"{self.name} ({count} experts, w13 {_told(up)}, w2 {_told(down)})"


Loaded = LoadedLayer | LoadedExperts


def on_gpu(packed: PackedWeight) -> bool:
    """Whether its launches are compiled for this machine, and so may be wrong on it alone."""
    return packed.qweight.is_cuda


def run_launches(layer: Loaded, target: Target, max_tokens: int, truth: Any = None) -> int:
    """Run every launch of a layer, each compared with the layer's `truth` or else on zeros.

    Returns:
        How many there were.

    Raises:
        KernelError: a launch does not run here, or gives something else than PyTorch.
    """
    count = 0
    for kernel, reached in layer.launches(target, max_tokens):
        found = None
        try:
            if truth is None:
                layer.run_once(kernel, reached, target)
            else:
                found = layer.compare(kernel, reached, target, truth)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _does_not_run(layer, target, reached, error) from error
        if found is not None:
            raise _is_wrong(layer, target, found)
        count += 1
    return count


def _does_not_run(
    layer: Loaded, target: Target, reached: Reached | ReachedExperts, error: Exception
) -> KernelError:
    own = _own_rows(reached, target)
    way_out = f"remove {own}, {_TUNED}" if own else _WAY_OUT
    return KernelError(
        f"{layer}: found that {reached} does not run on {_here(target)} "
        f"({type(error).__name__}: {str(error)[:500]}); supported: launches that compile and run; "
        f"{way_out}"
    )


def _is_wrong(layer: Loaded, target: Target, found: guard.Difference) -> KernelError:
    own = _own_rows(found.reached, target)
    way_out = f"remove {own}, {_TUNED}" if own else _WAY_OUT
    return KernelError(
        f"{layer}: found that {found.reached} is wrong on {_here(target)}: {found}; "
        f"supported: what plain PyTorch computes in float64, within rounding; "
        f"{way_out}"
    )


def _told(packed: PackedWeight) -> str:
    spec = packed.spec
    return (
        f"{spec.weight_type.value}, groups of {spec.group_size}, "
        f"[{packed.n}, {packed.k}] out_features x in_features per rank"
    )


def _here(target: Target) -> str:
    import triton

    return f"{target.device.name} with Triton {triton.__version__}, activations {target.act_dtype}"


def _own_rows(reached: Reached | ReachedExperts, target: Target) -> Path | None:
    """The user's file of measured rows where it named the launch."""
    import triton

    own = isinstance(reached, Reached) and reached.launch.source.startswith(YOURS)
    return own_file(target.device, triton.__version__) if own else None


_TUNED = "the rows that fusedq tune wrote, and report this message"
_WAY_OUT = (
    "install another Triton (with another vLLM) or serve without --quantization fusedq, and report "
    "this message"
)
