"""The layers of the vocabulary: lm_heads, input embeddings, and both on one packed weight."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from fusedq_kernels.catalogue import Op
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.layer import LayerFormat, Region
from vllm_fusedq.formats.shared.vocabulary import is_tied
from vllm_fusedq.integration.placeholder import check_layer_class
from vllm_fusedq.integration.resident import Multiplication, attach, check_sizes, finish
from vllm_fusedq.plan.layer import plan_layer
from vllm_fusedq.plan.model import quantized_embeddings
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard
from vllm_fusedq.worker.state import WorkerState


class FusedQVocabularyMethod(QuantizeMethodBase):
    """An lm_head, which is multiplied by, an embedding, whose rows are looked up, or both."""

    def __init__(
        self,
        state: WorkerState,
        prefix: str,
        module: str,
        layer_format: LayerFormat,
        ops: tuple[Op, ...] = (Op.MATMUL,),
    ) -> None:
        self.state = state
        self.prefix = prefix
        self.formats = {module: layer_format}
        self.ops = ops

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        _register_weight(layer, params_dtype)
        with self.state.guard():
            check_layer_class(layer, self.prefix)
            shard = self.shard_of(layer, input_size, sum(output_partition_sizes))
            plan = plan_layer(shard, self.formats, self.state.target)
        product, lookup = plan.use(Op.MATMUL), plan.use(Op.EMBEDDING)
        self.multiplication = Multiplication(product) if product is not None else None
        self.lookup_call = lookup.call.text if lookup is not None else ""
        attach(layer, plan, self.state, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        finish(layer, self.state)
        if self.multiplication is not None:
            self.multiplication.weight_loaded(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.multiplication(layer, x, bias)

    def shard_of(self, layer: VocabParallelEmbedding, k: int, n_padded: int) -> LayerShard:
        """This rank's part of the vocabulary; vLLM pads it and cuts the padding off the logits."""
        (module,) = self.formats
        check_sizes(self.formats, {module: layer.num_embeddings}, k)
        indices = layer.shard_indices
        start, stop = indices.org_vocab_start_index, indices.org_vocab_end_index
        return LayerShard(
            self.prefix,
            ParallelStyle.COLUMN,
            layer.tp_size,
            parts=(PartShard(module, None, Region(start, stop, 0, k)),),
            padding=n_padded - (stop - start),
            ops=self.ops,
        )

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows of this rank; vLLM has masked the ids of the others."""
        return torch.ops.fusedq.embedding(
            input_,
            layer.fusedq_qweight,
            layer.fusedq_scales,
            layer.fusedq_zeros,
            layer.fusedq_perm,
            self.lookup_call,
        )


class TiedHeadMethod(QuantizeMethodBase):
    """An lm_head without a weight: it multiplies by that of the embedding that it is tied to."""

    def __init__(self, prefix: str, module: str, state: WorkerState) -> None:
        self.prefix = prefix
        self.module = module
        self.state = state
        # No submodule of the lm_head, or its weight would count twice
        self.embeddings: tuple[VocabParallelEmbedding, ...] = ()

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, params_dtype: torch.dtype, **_: Any
    ) -> None:
        _register_weight(layer, params_dtype)

    def tie_weights(
        self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding
    ) -> ParallelLMHead:
        self.embeddings = (embed_tokens,)
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.embeddings:
            return
        with self.state.guard():
            raise PreflightError.single(
                layer=self.prefix,
                found="an lm_head that the checkpoint ties to the quantized "
                f"{self.module} and vLLM's model does not",
                supported="tied embeddings where vLLM's model ties them",
                fix="set tie_word_embeddings in config.json to what the model was trained with",
            )

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        (embeddings,) = self.embeddings
        return embeddings.quant_method.apply(embeddings, x, bias)


def _register_weight(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """vLLM's LoRA asks an lm_head for the dtype and the device of its weight."""
    layer.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)


def vocabulary_method(
    layer: VocabParallelEmbedding,
    prefix: str,
    module: str,
    state: WorkerState,
    fmt: CheckpointFormat,
) -> QuantizeMethodBase | None:
    """The method of an lm_head or an input embedding, None where the checkpoint has it unquantized.

    `module` is its name in the checkpoint, empty where vLLM's model does not say.
    """
    embeddings, tied = quantized_embeddings(fmt), is_tied(fmt.checkpoint)
    if isinstance(layer, ParallelLMHead):
        if (layer_format := fmt.layer_of(module)) is not None:
            return FusedQVocabularyMethod(state, prefix, module, layer_format)
        if embeddings and tied:
            return TiedHeadMethod(prefix, embeddings[0], state)
        return None
    if not module and len(embeddings) == 1:
        module = embeddings[0]
    if module not in embeddings or (layer_format := fmt.layer_of(module)) is None:
        return None
    ops = (Op.EMBEDDING, Op.MATMUL) if tied else (Op.EMBEDDING,)
    return FusedQVocabularyMethod(state, module, module, layer_format, ops)
