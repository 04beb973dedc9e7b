"""What vLLM's loading code finds where a checkpoint tensor belongs, and what it must not find.

A layer's own slicing is `plan/shards.py`'s, so a placeholder only passes tensors on. Code that
wants more, such as the dimension along which a tensor may be reordered, is about to rearrange
codes that are packed, or has left them out because there was no answer: it gets an error for one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.load.experts import ExpertsLoader
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.model_code import AS_STORED, WAY_OUT

# What vLLM's own parameters say of themselves to code that cuts or reorders them.
LAYOUT_ATTRIBUTES = ("output_dim", "input_dim", "packed_dim", "packed_factor")
# Layers whose cutting `plan/shards.py` knows.
KNOWN_LOADERS = frozenset(
    {
        linear.LinearBase,
        linear.ReplicatedLinear,
        linear.ColumnParallelLinear,
        linear.MergedColumnParallelLinear,
        linear.QKVParallelLinear,
        linear.RowParallelLinear,
        vocab_parallel_embedding.VocabParallelEmbedding,
        vocab_parallel_embedding.ParallelLMHead,
    }
)


class WeightLoader:
    """vLLM's per-parameter `weight_loader` callable for one checkpoint tensor name.

    Where `reordered`, the layer follows by itself what the model's code does to a plain weight.
    `before` is told of each tensor that arrives, by the device that it goes to. `guard` is that of
    the `WorkerState`, around what may refuse.
    """

    # vLLM's reload tells the loaders that it wrapped from the others by name.
    __name__ = "fusedq_weight_loader"

    def __init__(
        self,
        loader: LayerLoader | ExpertsLoader,
        name: str,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        reordered: bool = False,
        before: Callable[[torch.device], None] | None = None,
    ) -> None:
        self.loader = loader
        self.name = name
        self.guard = guard
        self.reordered = reordered
        self.before = before

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: object = None,
        **_: Any,
    ) -> None:
        if param.is_meta:
            # A reload's rehearsal, which counts copied elements; the tensor comes a second time
            param.copy_(param)
            return
        with self.guard():
            if self.before is not None:
                self.before(self.loader.packed.qweight.device)
            self.loader.add(self.name, loaded_weight, loaded_shard_id)

    def asked_for(self, attribute: str) -> None:
        """Model code reads a layout attribute; to know of none is right where rows are reordered.

        Raises:
            WeightLoadError: it is about to rearrange the tensor, or to leave it as it is.
        """
        if self.reordered or not self.loader.missing():
            return
        plan = self.loader.plan
        with self.guard():
            raise WeightLoadError(
                f"{plan.name}.{self.name}: found vLLM's code for this model asking for the "
                f"{attribute} of a quantized tensor, by which it rearranges weights while loading; "
                f"supported: {AS_STORED}; {WAY_OUT}"
            )


class ExpertWeightLoader(WeightLoader):
    """vLLM's `weight_loader` callable for one checkpoint tensor name of all experts of a layer."""

    # Llama 4 asks for it
    supports_moe_loading = True

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str = "",
        shard_id: object = None,
        expert_id: int = 0,
        return_success: bool = False,
        **_: Any,
    ) -> bool | None:
        """Whether the expert is this rank's, where it is asked for."""
        taken = True
        if param.is_meta:
            # A reload's rehearsal; see above
            param.copy_(param)
        else:
            with self.guard():
                if self.before is not None:
                    self.before(self.loader.packed.qweight.device)
                taken = self.loader.add(self.name, loaded_weight, shard_id, expert_id)
        return taken if return_success else None


class Placeholder(torch.nn.Parameter):
    """One element that stands for a checkpoint tensor and carries its `WeightLoader`."""

    def __new__(cls, dtype: torch.dtype, device: torch.device, loader: WeightLoader) -> Any:
        self = super().__new__(cls, torch.zeros(1, dtype=dtype, device=device), False)
        self.weight_loader = self.own_loader = loader
        return self


def _trap(attribute: str) -> property:
    def read(placeholder: Placeholder) -> None:
        loader = vars(placeholder).get("weight_loader")
        if isinstance(loader, WeightLoader):
            loader.asked_for(attribute)
        raise AttributeError(attribute)

    return property(read)


for _attribute in LAYOUT_ATTRIBUTES:
    setattr(Placeholder, _attribute, _trap(_attribute))


def expect_another_loader(layer: torch.nn.Module) -> Callable[[], None]:
    """For a layer whose tensors vLLM's Mamba mixer gives a loader by which it cuts plain weights.

    It is set on tensors of some names, before vLLM 0.32 on a `weight` that must be there in all
    formats. Returns what gives the placeholders their own loaders back.
    """
    stand_in = None
    if not hasattr(layer, "weight"):
        stand_in = layer.weight = torch.empty(0)
        stand_in.weight_loader = None

    def restore() -> None:
        if stand_in is not None:
            del layer.weight
        for parameter in layer.parameters(recurse=False):
            if isinstance(parameter, Placeholder):
                parameter.weight_loader = parameter.own_loader

    return restore


def check_layer_class(layer: torch.nn.Module, prefix: str) -> None:
    """Refuse a layer whose class cuts its weights in a way of its own.

    Raises:
        PreflightError: its `weight_loader` is none of vLLM's linear layers'.
    """
    for name in ("weight_loader", "weight_loader_v2"):
        owner = next((each for each in type(layer).__mro__ if name in vars(each)), None)
        if owner is not None and owner not in KNOWN_LOADERS:
            raise PreflightError.single(
                layer=prefix,
                found=f"a quantized {type(layer).__name__}, a layer with a {name} of its own, "
                "which may rearrange its weights while loading",
                supported="vLLM's own kinds of linear layers",
                fix=WAY_OUT,
            )
