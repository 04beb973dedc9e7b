"""The layers of the vocabulary: lm_heads, input embeddings, and both on one packed weight."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

import fusedq_kernels.embedding  # noqa: F401  (registers torch.ops.fusedq.embedding)
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.layer import LayerFormat, Region
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding, is_tied
from vllm_fusedq.integration.last_words import speaking_last
from vllm_fusedq.integration.linear import FusedQLinearMethod
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard
from vllm_fusedq.worker.state import WorkerState


class FusedQVocabularyMethod(FusedQLinearMethod):
    """An lm_head, which is `multiplied`, an embedding, whose rows are `gathered`, or both."""

    def __init__(
        self,
        state: WorkerState,
        prefix: str,
        module: str,
        layer_format: LayerFormat,
        gathered: bool = False,
        multiplied: bool = True,
    ) -> None:
        super().__init__(state, prefix, (module,), {module: layer_format})
        self.gathered = gathered
        self.multiplied = multiplied

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, params_dtype: torch.dtype, **options: Any
    ) -> None:
        _register_weight(layer, params_dtype)
        super().create_weights(layer, *sizes, params_dtype=params_dtype, **options)
        plan, layout = layer.fusedq_loader.plan, layer.fusedq_loader.packed.layout
        if plan.gather is not None:
            self.lookup_constants = (
                *(plan.n, plan.k, plan.spec.group_size),
                *(plan.spec.weight_type.value, plan.spec.scale_dtype.value),
                *(layout.value, plan.gather.value, self.state.target.act_dtype.torch),
            )

    def shard_of(
        self, layer: VocabParallelEmbedding, k_local: int, n_local: list[int], input_size: int
    ) -> LayerShard:
        """This rank's part of the vocabulary; vLLM pads it and cuts the padding off the logits."""
        (module,) = self.modules
        self.check_sizes({module: layer.num_embeddings}, input_size)
        indices = layer.shard_indices
        start, stop = indices.org_vocab_start_index, indices.org_vocab_end_index
        return LayerShard(
            *(self.prefix, ParallelStyle.COLUMN, layer.tp_size),
            parts=(PartShard(module, None, Region(start, stop, 0, k_local)),),
            padding=sum(n_local) - (stop - start),
            gathered=self.gathered,
            multiplied=self.multiplied,
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
        _register_weight(layer, params_dtype)

    def tie_weights(
        self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding
    ) -> ParallelLMHead:
        self.embeddings = (embed_tokens,)
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.embeddings:
            return
        with speaking_last(self.message_file):
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
            return TiedHeadMethod(prefix, embeddings[0], state.message_file)
        return None
    if not module and len(embeddings) == 1:
        module = embeddings[0]
    if module not in embeddings or (layer_format := fmt.layer_of(module)) is None:
        return None
    return FusedQVocabularyMethod(
        *(state, module, module, layer_format), gathered=True, multiplied=tied
    )


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
    rank, embeddings = state.rank, quantized_embeddings(fmt)
    last = rank.pipeline == rank.pipeline_size - 1
    here = rank.pipeline == 0 or (last and is_tied(fmt.checkpoint))
    if not embeddings or not here or any(plan.gather for plan in state.plans):
        return
    raise PreflightError.single(
        layer=embeddings[0],
        found="a quantized embedding in a model that vLLM builds with an unquantized one",
        supported="models whose embedding vLLM builds with its quantization config (Llama, Qwen2 "
        "and 3, Mistral, Granite and many others)",
        fix="quantize again without the embedding",
    )
