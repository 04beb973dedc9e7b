"""`--quantization fusedq`: vLLM's configuration hooks, each delegating to the planner.

Every vLLM process imports this module, also those that serve something else: what a hook needs is
imported where it is used.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_fusedq.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from vllm_fusedq.formats.base import CheckpointFormat
    from vllm_fusedq.worker.state import WorkerState

logger = logging.getLogger("vllm.fusedq")


class FusedQConfig(QuantizationConfig):
    """Plain data that vLLM pickles into every process; see vLLM's base class for the hooks."""

    NAME = "fusedq"
    format: "CheckpointFormat"  # from `maybe_update_config` on, which vLLM always calls

    def __init__(self) -> None:
        super().__init__()
        self.message_file: str | None = None
        # vLLM's module names -> the checkpoint's, where a model renames its modules.
        self.renamed_modules: dict[str, str] = {}
        # What this process knows, once it builds layers.
        self.worker: WorkerState | None = None

    def get_name(self) -> str:
        return self.NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # `maybe_update_config` reads the checkpoint's own files, with better errors.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FusedQConfig":
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **_: Any
    ) -> str | None:
        return cls.NAME if user_quant == cls.NAME else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Keep `.g_idx`, which vLLM's base class drops from every quantized checkpoint."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """vLLM's attention layers ask for it: with a scheme `--kv-cache-dtype auto` is fp8.

        A draft model follows the cache of its target, whose layers exist by then.
        """
        fmt, draft = getattr(self, "format", None), self.worker is not None and self.worker.draft
        return None if fmt is None or draft else fmt.kv_cache_scheme

    def get_cache_scale_mapper(self) -> Any:
        """Rename the checkpoint tensors that no torch parameter can be named after.

        The others keep their names, also where a model's code renames them for vLLM's own methods
        (Mistral 3's scales). And drop those of a LoRA adapter beside the model, which vLLM reads
        where there is no index.
        Stacks of experts are taken apart. This hook is older than `get_checkpoint_weight_mapper`,
        and every vLLM that is supported applies it in the same place, to all tensors.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        from vllm_fusedq.checkpoint.read import ADAPTER_FILE, ADAPTER_PREFIX
        from vllm_fusedq.checkpoint.stacks import pieces_of
        from vllm_fusedq.formats.kv_cache import OUTPUT_SCALES
        from vllm_fusedq.integration.stacks import StackMapper
        from vllm_fusedq.names import parameter_name

        if self.worker is not None:
            with self.worker.guard():
                self.worker.all_created(self.format)
        names = self.format.tensor_names
        renamed = {f".{name}": f".{parameter_name(name)}" for name in names} | OUTPUT_SCALES
        unread = self.format.checkpoint.unread
        dropped = {ADAPTER_PREFIX: None} if ADAPTER_FILE in unread else {}
        own = WeightsMapper(orig_to_new_suffix=renamed, orig_to_new_prefix=dropped)
        mapper = super().get_cache_scale_mapper() | own
        pieces = pieces_of(self.format.checkpoint.tensors)
        return StackMapper.of(mapper, pieces) if pieces else mapper

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Runs in the API process while vLLM builds its configuration: refuse here, first.

        The tensor-parallel size is not known yet; what depends on it is refused by the workers
        before they read a weight.
        """
        from vllm_fusedq.checkpoint.read import read_checkpoint
        from vllm_fusedq.formats import format_for
        from vllm_fusedq.integration.devices import announced_device
        from vllm_fusedq.plan.advice import listed_otherwise, unread_files
        from vllm_fusedq.plan.kv_cache import kv_cache_summary
        from vllm_fusedq.plan.layer import Target
        from vllm_fusedq.plan.model import plan_model
        from vllm_fusedq.worker.last_words import name_message_file

        # vLLM composes it with any checkpoint's own quantization, from 0.30 on
        if getattr(self, "online_quantization_config", None) is not None:
            raise UnsupportedCheckpoint(
                f"{model_name}: found --quantization-config, by which vLLM quantizes layers while "
                "loading; supported: layers as the checkpoint stores them; leave it out"
            )
        self.format = format_for(read_checkpoint(model_name, revision))
        # Settings are not known here: what takes the user's consent, workers decide
        consent = {"keeps_activations": True, "experimental": True}
        target = Target(announced_device(), torch.bfloat16, **consent)
        plan = plan_model(self.format.checkpoint, target)
        for said in (
            *listed_otherwise(self.format, plan.unquantized),
            *unread_files(self.format.checkpoint),
        ):
            logger.warning("%s: %s", said.layer, said.message)
        if cache := kv_cache_summary(self.format):
            logger.info("%s: %s", self.format.checkpoint.path, cache)
        self.message_file = name_message_file()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        for module in (*self.format.checkpoint.modules(), *self.format.kv_tensors):
            for renamed in hf_to_vllm_mapper.apply_list([module]):
                self.renamed_modules[renamed] = module

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Fused where the checkpoint is quantized, vLLM's own method where it is not."""
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from vllm_fusedq.integration.experts import experts_method
        from vllm_fusedq.integration.kv_cache import kv_cache_method
        from vllm_fusedq.integration.linear import FusedQLinearMethod
        from vllm_fusedq.integration.vocabulary import vocabulary_method
        from vllm_fusedq.integration.worker import start_worker
        from vllm_fusedq.names import stored_experts
        from vllm_fusedq.plan.model_code import state_rows, stores_head_groups
        from vllm_fusedq.worker.last_words import speaking_last

        if not isinstance(layer, LinearBase | VocabParallelEmbedding | Attention | RoutedExperts):
            return None
        with speaking_last(self.message_file):
            if self.worker is None:
                self.worker = start_worker(self.format.checkpoint, self, self.message_file)
            if isinstance(layer, Attention):
                return kv_cache_method(layer, prefix, self, self.worker)
            if isinstance(layer, RoutedExperts):
                name = stored_experts(
                    prefix, self.format.checkpoint.modules(), self.renamed_modules
                )
                return experts_method(layer, prefix, name, self.worker, self.format)
            modules = self.modules_of(prefix)
            if isinstance(layer, VocabParallelEmbedding):
                return vocabulary_method(layer, prefix, modules[0], self.worker, self.format)
            formats = {module: self.format.layer_of(module) for module in modules}
        if any(formats.values()):
            checkpoint, first = self.format.checkpoint, formats[modules[0]]
            head_groups = stores_head_groups(checkpoint, modules[0])
            states = first and state_rows(checkpoint, modules[0], first.n)
            return FusedQLinearMethod(self.worker, prefix, formats, head_groups, states)
        return UnquantizedLinearMethod()

    def modules_of(self, prefix: str) -> tuple[str, ...]:
        """The checkpoint modules that vLLM stacks in its layer `prefix`, in order."""
        from vllm_fusedq.names import stored_modules

        modules = self.format.checkpoint.modules()
        return stored_modules(prefix, modules, self.renamed_modules, self.packed_modules_mapping)
