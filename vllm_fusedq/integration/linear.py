"""The linear method: registers what the plan says, hands tensors to the loader, calls the op."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

import fusedq_kernels.op  # noqa: F401  (registers torch.ops.fusedq.matmul)
from fusedq_kernels.cpu.kernels import wna16_call
from fusedq_kernels.types import KernelName
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.integration.config import parameter_name
from vllm_fusedq.integration.last_words import speaking_last
from vllm_fusedq.integration.placeholder import Placeholder, WeightLoader, check_layer_class
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.head_order import HeadOrder
from vllm_fusedq.plan.layer import plan_layer
from vllm_fusedq.plan.shards import QKV_SHARD_IDS, LayerShard, ParallelStyle, partition_parts
from vllm_fusedq.worker.state import WorkerState

RESIDENT = ("qweight", "scales", "zeros", "perm")


class FusedQLinearMethod(LinearMethodBase):
    """Runs one linear layer from its packed weight, never from a dequantized one.

    With `head_groups` an attention layer's rows are stored in the order of `HeadOrder`.
    """

    def __init__(
        self,
        state: WorkerState,
        prefix: str,
        modules: tuple[str, ...],
        formats: Mapping[str, LayerFormat | None],
        head_groups: bool = False,
    ) -> None:
        self.state = state
        self.prefix = prefix
        self.modules = modules
        self.formats = formats
        self.head_groups = head_groups
        self.traced_call: Callable[..., None] | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register the resident tensors, and a placeholder for each checkpoint tensor.

        The placeholders, of one element, only carry a `weight_loader` (and the names that vLLM's
        LoRA looks for); slicing is `plan/shards.py`'s, exact also where vLLM's own loaders would
        round.
        """
        with speaking_last(self.state.message_file):
            check_layer_class(layer, self.prefix)
            shard = self.shard_of(
                layer, input_size_per_partition, output_partition_sizes, input_size
            )
            plan = plan_layer(shard, self.formats, self.state.target)
        self.state.plans.append(plan)
        self.op_constants = (
            plan.n,
            plan.rows,
            plan.k,
            plan.spec.group_size,
            plan.phase,
            plan.spec.weight_type.value,
            plan.spec.scale_dtype.value,
            plan.kernel.value,
            self.state.target.batch_invariant,
            self.state.target.sliced_prefill,
        )
        device = torch.get_default_device()
        loader = LayerLoader.create(plan, params_dtype, device, self.state.source)
        for name, dtype in loader.tensor_dtypes.items():
            weight_loader = WeightLoader(
                loader, name, self.state.message_file, reordered=self.head_groups
            )
            placeholder = Placeholder(dtype, device, weight_loader)
            layer.register_parameter(parameter_name(name), placeholder)
        for name in RESIDENT:
            tensor = getattr(loader.packed, name)
            layer.register_buffer(f"fusedq_{name}", tensor, persistent=False)
        layer.fusedq_loader = loader

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every tensor arrived; runs again after each of vLLM's reloads."""
        with speaking_last(self.state.message_file):
            layer.fusedq_loader.check_complete()
            for name in RESIDENT:
                # A reload puts tensors of its own here; the loader filled those of the graphs
                setattr(layer, f"fusedq_{name}", getattr(layer.fusedq_loader.packed, name))
            if layer.fusedq_loader.plan.kernel is KernelName.CPU_WNA16:
                act_dtype = self.state.target.act_dtype.torch
                self.traced_call = wna16_call(layer.fusedq_loader.packed, act_dtype)
            has_bias = isinstance(getattr(layer, "bias", None), torch.Tensor)
            self.state.layer_loaded(layer.fusedq_loader, has_bias)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = x.new_empty((*x.shape[:-1], self.op_constants[0]))
        if self.traced_call is not None and x.ndim == 2 and torch.compiler.is_compiling():
            weight = (layer.fusedq_qweight, layer.fusedq_scales, layer.fusedq_zeros)
            self.traced_call(out, x, *weight, bias)
            return out
        torch.ops.fusedq.matmul_out(
            out,
            x,
            layer.fusedq_qweight,
            layer.fusedq_scales,
            layer.fusedq_zeros,
            bias,
            layer.fusedq_perm,
            *self.op_constants,
        )
        return out

    def shard_of(
        self, layer: torch.nn.Module, k_local: int, n_local: list[int], input_size: int
    ) -> LayerShard:
        """This rank's shard, from the partition sizes that vLLM gave the layer."""
        qkv = isinstance(layer, QKVParallelLinear)
        if qkv and len(n_local) != len(QKV_SHARD_IDS):
            self._refuse_attention(len(n_local))
        style = _style_of(layer)
        stored = {module: fmt.n if fmt else None for module, fmt in self.formats.items()}
        parts, totals = partition_parts(
            *(stored, n_local, k_local, style, layer.tp_size, layer.tp_rank),
            kv_replicas=layer.num_kv_head_replicas if qkv else None,
        )
        self.check_sizes(totals, input_size)
        if qkv and self.head_groups:
            kv_heads = layer.total_num_kv_heads
            order = HeadOrder(kv_heads, layer.total_num_heads // kv_heads, layer.head_size)
            parts = order.stored_parts(parts)
        return LayerShard(self.prefix, style, layer.tp_size, parts)

    def _refuse_attention(self, parts: int) -> None:
        raise PreflightError.single(
            layer=self.prefix,
            found=f"an attention layer that fuses {parts} projections",
            supported="query, key and value projections",
            fix="serve this model without --quantization fusedq",
        )

    def check_sizes(self, n_by_module: Mapping[str, int], k: int) -> None:
        """The checkpoint's modules must be as large as the model's config makes the layer."""
        problems = [
            Problem(
                layer=module,
                found=f"[{fmt.n}, {fmt.k}] (out_features x in_features) in the checkpoint",
                supported=f"[{n}, {k}], which the model's config asks for",
                fix="config.json and the weights are not of the same model; download both again",
            )
            for module, n in n_by_module.items()
            if (fmt := self.formats[module]) is not None and (fmt.n, fmt.k) != (n, k)
        ]
        if problems:
            raise PreflightError(problems)


def _style_of(layer: torch.nn.Module) -> ParallelStyle:
    # Also a replicated layer has the tp_size of all ranks
    if isinstance(layer, ReplicatedLinear):
        return ParallelStyle.REPLICATED
    return ParallelStyle.ROW if isinstance(layer, RowParallelLinear) else ParallelStyle.COLUMN
