"""Quantized input embeddings, and the lm_head that is tied to one: both read one packed weight."""

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

import fusedq_kernels.embedding  # noqa: F401  (registers torch.ops.fusedq.embedding)
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.embeddings import is_input_embedding, is_tied
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.integration.last_words import speaking_last
from vllm_fusedq.integration.linear import FusedQLinearMethod
from vllm_fusedq.integration.worker import WorkerState
from vllm_fusedq.sharding import LayerShard


class FusedQEmbeddingMethod(FusedQLinearMethod):
    """Looks rows up in a packed weight; `apply` multiplies by it where it is the lm_head too."""

    def __init__(
        self, state: WorkerState, module: str, layer_format: LayerFormat, tied: bool
    ) -> None:
        super().__init__(state, module, (module,), {module: layer_format})
        self.tied = tied

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **options: Any) -> None:
        super().create_weights(layer, *sizes, **options)
        plan, packed = layer.fusedq_loader.plan, layer.fusedq_loader.packed
        self.lookup_constants = (
            *(plan.n, plan.k, *self.op_constants[3:4], *self.op_constants[5:7]),
            *(packed.layout.value, plan.gather.value, self.state.target.act_dtype.torch),
        )

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows of this rank; vLLM has masked the ids of the others."""
        return torch.ops.fusedq.embedding(
            input_,
            layer.fusedq_qweight,
            layer.fusedq_scales,
            layer.fusedq_zeros,
            layer.fusedq_perm,
            *self.lookup_constants,
        )

    def _head_shard(self, layer: VocabParallelEmbedding, n_local: list[int]) -> LayerShard:
        shard = super()._head_shard(layer, n_local)
        return replace(shard, gathered=True, multiplied=self.tied)


class TiedHeadMethod(QuantizeMethodBase):
    """An lm_head without a weight: it multiplies by that of the embedding that it is tied to."""

    def __init__(self, prefix: str, module: str, message_file: str | None) -> None:
        self.prefix = prefix
        self.module = module
        self.message_file = message_file
        # No submodule of the lm_head, or its weight would count twice
        self.embeddings: tuple[VocabParallelEmbedding, ...] = ()

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, params_dtype: torch.dtype, **_: Any
    ) -> None:
        # vLLM's LoRA asks it for the dtype and the device of its weight
        layer.register_buffer("weight", torch.empty(0, dtype=params_dtype), persistent=False)

    def tie_weights(
        self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding
    ) -> ParallelLMHead:
        self.embeddings = (embed_tokens,)
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.embeddings:
            return
        problem = Problem(
            layer=self.prefix,
            found=f"an lm_head that the checkpoint ties to the quantized {self.module} and vLLM's "
            "model does not",
            supported="tied embeddings where vLLM's model ties them",
            fix="set tie_word_embeddings in config.json to what the model was trained with",
        )
        with speaking_last(self.message_file):
            raise PreflightError([problem])

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        (embeddings,) = self.embeddings
        return embeddings.quant_method.apply(embeddings, x, bias)


def embedding_method(
    module: str, state: WorkerState, fmt: CheckpointFormat
) -> FusedQEmbeddingMethod | None:
    """The method of an input embedding, None where the checkpoint leaves it unquantized.

    `module` is its name in the checkpoint, empty where vLLM's model does not say.
    """
    embeddings = quantized_embeddings(fmt)
    if not module and len(embeddings) == 1:
        module = embeddings[0]
    if module not in embeddings or (layer_format := fmt.spec_for(module)) is None:
        return None
    return FusedQEmbeddingMethod(state, module, layer_format, is_tied(fmt.checkpoint))


def tied_head_method(
    prefix: str, state: WorkerState, fmt: CheckpointFormat
) -> TiedHeadMethod | None:
    """The method of an lm_head without tensors, None unless it is tied to a quantized embedding."""
    embeddings = quantized_embeddings(fmt)
    if not embeddings or not is_tied(fmt.checkpoint):
        return None
    return TiedHeadMethod(prefix, embeddings[0], state.message_file)


def quantized_embeddings(fmt: CheckpointFormat) -> list[str]:
    """The checkpoint's quantized input embeddings, of which a model has one."""
    return [module for module in fmt.modules() if is_input_embedding(module)]


def check_all_created(state: WorkerState, fmt: CheckpointFormat) -> None:
    """Before weights are loaded: vLLM must have built its quantized embedding with this config.

    Some of vLLM's models build their embeddings without a quantization config, and no hook is asked
    then.

    Raises:
        PreflightError: the checkpoint has a quantized embedding and the model no place for it.
    """
    rank, embeddings = state.live.rank, quantized_embeddings(fmt)
    last = rank.pipeline == rank.pipeline_size - 1
    here = rank.pipeline == 0 or (last and is_tied(fmt.checkpoint))
    if not embeddings or not here or any(plan.gather for plan in state.plans):
        return
    problem = Problem(
        layer=embeddings[0],
        found="a quantized embedding in a model that vLLM builds with an unquantized one",
        supported="models whose embedding vLLM builds with its quantization config (Llama, Qwen2 "
        "and 3, Mistral, Granite and many others)",
        fix="quantize again without the embedding",
    )
    raise PreflightError([problem])
