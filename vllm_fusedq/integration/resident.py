"""A vLLM layer's packed weight: its tensors in the layer, its loaders, the call of its kernel."""

from collections.abc import Callable, Mapping

import torch

import fusedq_kernels.ops  # noqa: F401  (registers torch.ops.fusedq)
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.integration.placeholder import (
    ExpertWeightLoader,
    Placeholder,
    WeightLoader,
)
from vllm_fusedq.load.experts import ExpertsLoader
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.names import parameter_name
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.uses import Use
from vllm_fusedq.worker.state import WorkerState


def attach(
    layer: torch.nn.Module,
    plan: LayerPlan,
    state: WorkerState,
    params_dtype: torch.dtype,
    reordered: bool = False,
) -> None:
    """Register the resident tensors of `plan`, and a placeholder for each checkpoint tensor.

    The placeholders, of one element, only carry a `weight_loader` (and the names that vLLM's LoRA
    looks for); slicing is `plan/shards.py`'s, exact also where vLLM's own loaders would round.
    Both are named after the weight where the layer has several. `layer.fusedq_loaders` are behind
    them; `reordered` is that of `WeightLoader`.
    """
    state.layer_created(plan, lambda: _has_bias(layer))
    device = torch.get_default_device()
    fills, takes = LayerLoader, WeightLoader
    if plan.experts is not None:
        fills, takes = ExpertsLoader, ExpertWeightLoader
    loader = fills.create(plan, params_dtype, device, state.source)
    for name, dtype in loader.tensor_dtypes.items():
        weight_loader = takes(
            loader,
            name,
            state.guard,
            reordered=reordered,
            before=state.weight_arrives,
        )
        placeholder = Placeholder(dtype, device, weight_loader)
        layer.register_parameter(_of_weight(plan, parameter_name(name)), placeholder)
    for name, tensor in loader.resident.items():
        layer.register_buffer(f"fusedq_{_of_weight(plan, name)}", tensor, persistent=False)
    layer.fusedq_loaders = (*getattr(layer, "fusedq_loaders", ()), loader)


def finish(layer: torch.nn.Module, state: WorkerState) -> None:
    """Check that every tensor of the attached weights arrived; again after each of vLLM's reloads.

    Raises:
        WeightLoadError: one did not, or the layers contradict each other.
        KernelError: with the last layer, a launch that does not run here, or is wrong.
    """
    with state.guard():
        has_bias = _has_bias(layer)
        for loader in layer.fusedq_loaders:
            loader.check_complete()
            for name, resident in loader.resident.items():
                # A reload puts tensors of its own here; the loader filled those of the graphs
                setattr(layer, f"fusedq_{_of_weight(loader.plan, name)}", resident)
            state.layer_loaded(loader, has_bias)


def _has_bias(layer: torch.nn.Module) -> bool:
    return isinstance(getattr(layer, "bias", None), torch.Tensor)


def _of_weight(plan: LayerPlan, name: str) -> str:
    return f"{plan.shard.weight}_{name}" if plan.shard.weight else name


def check_sizes(
    formats: Mapping[str, LayerFormat | None], n_by_module: Mapping[str, int], k: int
) -> None:
    """The checkpoint's modules must be as large as the model's config makes the layer.

    Raises:
        PreflightError: one is not.
    """
    problems = [
        Problem(
            layer=module,
            found=f"[{fmt.n}, {fmt.k}] (out_features x in_features) in the checkpoint",
            supported=f"[{n}, {k}], which the model's config asks for",
            fix="config.json and the weights are not of the same model; download both again",
        )
        for module, n in n_by_module.items()
        if (fmt := formats[module]) is not None and (fmt.n, fmt.k) != (n, k)
    ]
    if problems:
        raise PreflightError(problems)


class Multiplication:
    """`y = x @ W.T + bias` by the only packed weight of an attached layer."""

    def __init__(self, use: Use) -> None:
        self.n, self.kernel, self.call = use.call.n, use.kernel, use.call.text
        self.act_dtype = use.call.dtype.torch
        self.traced_call: Callable[..., None] | None = None

    def weight_loaded(self, layer: torch.nn.Module) -> None:
        """Where the kernel's operator can be called with nothing around it, keep that call."""
        (loader,) = layer.fusedq_loaders
        self.traced_call = self.kernel.bare_call(loader.packed, self.act_dtype)

    def __call__(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        out = x.new_empty((*x.shape[:-1], self.n))
        if self.traced_call is not None and x.ndim == 2 and torch.compiler.is_compiling():
            self.traced_call(
                out,
                x,
                layer.fusedq_qweight,
                layer.fusedq_scales,
                layer.fusedq_zeros,
                bias,
                layer.fusedq_perm,
            )
            return out
        torch.ops.fusedq.matmul_out(
            out,
            x,
            layer.fusedq_qweight,
            layer.fusedq_scales,
            layer.fusedq_zeros,
            bias,
            layer.fusedq_perm,
            self.call,
        )
        return out
