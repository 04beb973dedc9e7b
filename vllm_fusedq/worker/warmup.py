"""Readies every launch that a model can reach, so that nothing is compiled while serving.

What has to be compiled is known once the layers exist: `compile_ahead` does that on all cores while
weights are read. `warm_up` then runs each launch, and compares it with plain PyTorch on a GPU.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fusedq_kernels.layouts import packing
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.prove.launches import Loaded, LoadedExperts, LoadedLayer, on_gpu, run_launches

if TYPE_CHECKING:
    from fusedq_kernels.cuda.ahead import AheadCompiler


@dataclass(frozen=True, slots=True)
class WarmUp:
    """`launches` kernels ran, in `seconds`, of which `waited` for the compiler; `checked` of them
    were compared with plain PyTorch. Compiled kernels lie in `cache`, None where there are none."""

    seconds: float
    launches: int
    waited: float = 0.0
    checked: int = 0
    cache: str | None = None

    def __add__(self, later: "WarmUp") -> "WarmUp":
        return WarmUp(
            self.seconds + later.seconds,
            self.launches + later.launches,
            self.waited + later.waited,
            self.checked + later.checked,
            later.cache or self.cache,
        )


def compile_ahead(
    plans: Iterable[tuple[LayerPlan, bool]],
    experts: Iterable[LoadedExperts],
    target: Target,
    max_tokens: int,
    device: torch.device,
) -> "AheadCompiler | None":
    """Start to compile each distinct launch of layers, each with whether it has a bias, and of
    experts, whose plans are left out.

    None where nothing is compiled: on a CPU, also in Triton's interpreter.
    """
    if device.type != "cuda":
        return None
    from fusedq_kernels.cuda.ahead import AheadCompiler

    layers: dict[object, Loaded] = {
        each.kind: replace(each, resident=each.resident.as_meta()) for each in experts
    }
    for plan, has_bias in plans:
        if plan.experts is not None:
            continue
        packed = packing.empty_packed(
            plan.layout,
            plan.n,
            plan.rows,
            plan.spec,
            plan.phase,
            target.act_dtype,
            "meta",
            in_features=plan.k,
            ordered=plan.ordered,
        )
        layer = LoadedLayer(plan.name, packed, plan.uses, has_bias)
        layers.setdefault(layer.kind, layer)

    def work() -> None:
        for layer in layers.values():
            for kernel, reached in layer.launches(target, max_tokens):
                layer.run_once(kernel, reached, target)

    return AheadCompiler(work, device)


def warm_up(
    layers: Iterable[Loaded],
    target: Target,
    max_tokens: int,
    *,
    check: bool = True,
    ahead: Iterable["AheadCompiler"] = (),
    known: set[object] | None = None,
) -> WarmUp:
    """Run each distinct launch of `layers` for 1 to `max_tokens` tokens.

    Layers of one kind share their launches; kinds that are `known` are left out, and those that are
    run join them. On a GPU each is compared with plain
    PyTorch if `check`. In Triton's interpreter there is nothing to compile, and nothing is run.

    Raises:
        KernelError: a launch does not run here, or is wrong.
    """
    start = time.perf_counter()
    cache = None
    for compiler in ahead:
        compiler.wait()
        cache = str(compiler.cache)
    waited = time.perf_counter() - start
    known = set() if known is None else known
    count = checked = 0
    for layer in layers:
        device = layer.packed.qweight.device.type
        if layer.kind in known or any(kernel.device != device for kernel in layer.kernels):
            continue
        known.add(layer.kind)
        compare = check and on_gpu(layer.packed)
        truth = layer.truth(target) if compare else None
        ran = run_launches(layer, target, max_tokens, truth)
        count += ran
        checked += ran * compare
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return WarmUp(time.perf_counter() - start, count, waited, checked, cache)
