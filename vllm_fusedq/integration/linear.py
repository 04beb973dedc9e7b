"""The linear method: plans this rank's shard of a vLLM layer and runs it from its packed weight."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.integration.placeholder import check_layer_class, expect_another_loader
from vllm_fusedq.integration.resident import Multiplication, attach, check_sizes, finish
from vllm_fusedq.plan.head_order import HeadOrder
from vllm_fusedq.plan.layer import plan_layer
from vllm_fusedq.plan.shards import QKV_SHARD_IDS, LayerShard, ParallelStyle, partition_parts
from vllm_fusedq.plan.state_rows import StateRows
from vllm_fusedq.worker.state import WorkerState


class FusedQLinearMethod(LinearMethodBase):
    """Runs one linear layer from its packed weight, never from a dequantized one.

    With `head_groups` an attention layer's rows are stored in the order of `HeadOrder`; `states`
    are those of a Mamba-2 layer of which every rank holds a part whole.
    """

    def __init__(
        self,
        state: WorkerState,
        prefix: str,
        formats: Mapping[str, LayerFormat | None],
        head_groups: bool = False,
        states: StateRows | None = None,
    ) -> None:
        self.state = state
        self.prefix = prefix
        self.formats = formats
        self.head_groups = head_groups
        self.states = states

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
        with self.state.guard():
            check_layer_class(layer, self.prefix)
            shard = self.shard_of(
                layer, input_size_per_partition, output_partition_sizes, input_size
            )
            plan = plan_layer(shard, self.formats, self.state.target)
        self.multiplication = Multiplication(plan.main)
        attach(layer, plan, self.state, params_dtype, reordered=self.head_groups)
        if self._follows_states(output_partition_sizes):
            self.state.before_loading.append(expect_another_loader(layer))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        finish(layer, self.state)
        self.multiplication.weight_loaded(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.multiplication(layer, x, bias)

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
            stored,
            n_local,
            k_local,
            style,
            layer.tp_size,
            layer.tp_rank,
            kv_replicas=layer.num_kv_head_replicas if qkv else None,
        )
        if self._follows_states(n_local):
            (module,) = totals
            parts = self.states.shard(module, k_local, layer.tp_size, layer.tp_rank)
            totals[module] -= self.states.states * (layer.tp_size - 1)
        check_sizes(self.formats, totals, input_size)
        if qkv and self.head_groups:
            kv_heads = layer.total_num_kv_heads
            order = HeadOrder(kv_heads, layer.total_num_heads // kv_heads, layer.head_size)
            parts = order.stored_parts(parts)
        return LayerShard(self.prefix, style, layer.tp_size, parts)

    def _follows_states(self, n_local: list[int]) -> bool:
        """vLLM gives such a layer one part in place of five where ranks outnumber the groups."""
        return self.states is not None and len(n_local) == 1

    def _refuse_attention(self, parts: int) -> None:
        raise PreflightError.single(
            layer=self.prefix,
            found=f"an attention layer that fuses {parts} projections",
            supported="query, key and value projections",
            fix="serve this model without --quantization fusedq",
        )


def _style_of(layer: torch.nn.Module) -> ParallelStyle:
    # Also a replicated layer has the tp_size of all ranks
    if isinstance(layer, ReplicatedLinear):
        return ParallelStyle.REPLICATED
    return ParallelStyle.ROW if isinstance(layer, RowParallelLinear) else ParallelStyle.COLUMN
