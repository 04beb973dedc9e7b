"""`--quantization fusedq`: vLLM's configuration hooks, each delegating to the planner.

Every vLLM process imports this module, also those that serve something else: what a hook needs is
imported where it is used.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_fusedq.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from vllm_fusedq.checkpoint import Checkpoint
    from vllm_fusedq.formats.base import CheckpointFormat
    from vllm_fusedq.integration.worker import WorkerState


class FusedQConfig(QuantizationConfig):
    """Plain data that vLLM pickles into every process; see vLLM's base class for the hooks."""

    NAME = "fusedq"

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint: Checkpoint | None = None
        self.format: CheckpointFormat | None = None
        self.message_file: str | None = None
        # vLLM's module names -> the checkpoint's, where a model renames its modules.
        self.renamed_modules: dict[str, str] = {}
        self._worker: WorkerState | None = None

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

    def get_cache_scale_mapper(self) -> Any:
        """Rename the checkpoint tensors that no torch parameter can be named after.

        This hook is older than `get_checkpoint_weight_mapper`, and every vLLM that is supported
        applies it in the same place, to all tensors.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        if self._worker is not None:
            from vllm_fusedq.integration.embedding import check_all_created
            from vllm_fusedq.integration.last_words import speaking_last

            with speaking_last(self.message_file):
                check_all_created(self._worker, self._loaded_format())
        names = {f".{name}": f".{parameter_name(name)}" for name in self._loaded_format().markers}
        renamed = {old: new for old, new in names.items() if old != new}
        return super().get_cache_scale_mapper() | WeightsMapper(orig_to_new_suffix=renamed)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Runs in the API process while vLLM builds its configuration: refuse here, first.

        The tensor-parallel size is not known yet; what depends on it is refused by the workers
        before they read a weight.
        """
        from vllm_fusedq.checkpoint import read_checkpoint
        from vllm_fusedq.formats import format_for
        from vllm_fusedq.integration.devices import announced_device
        from vllm_fusedq.integration.last_words import open_message_file
        from vllm_fusedq.plan import Target
        from vllm_fusedq.preflight import plan_model

        self.checkpoint = read_checkpoint(model_name, revision)
        self.format = format_for(self.checkpoint)
        plan_model(self.checkpoint, Target(announced_device(), torch.bfloat16))
        self.message_file = open_message_file()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        modules = list(self._loaded_format().checkpoint.modules())
        for module in modules:
            for renamed in hf_to_vllm_mapper.apply_list([module]):
                self.renamed_modules[renamed] = module

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Fused where the checkpoint is quantized, vLLM's own method where it is not."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from vllm_fusedq.integration.embedding import embedding_method, tied_head_method
        from vllm_fusedq.integration.last_words import speaking_last
        from vllm_fusedq.integration.linear import FusedQLinearMethod

        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return None
        head = isinstance(layer, ParallelLMHead)
        with speaking_last(self.message_file):
            state, fmt = self._worker_state(), self._loaded_format()
            modules = self.modules_of(prefix)
            if isinstance(layer, VocabParallelEmbedding) and not head:
                return embedding_method(modules[0], state, fmt)
            formats = {module: fmt.spec_for(module) for module in modules}
        if any(formats.values()):
            return FusedQLinearMethod(state, prefix, modules, formats)
        return tied_head_method(prefix, state, fmt) if head else UnquantizedLinearMethod()

    def modules_of(self, prefix: str) -> tuple[str, ...]:
        """The checkpoint modules that vLLM stacks in its layer `prefix`, in order."""
        from vllm_fusedq.integration.draft import stored_prefix

        modules = self._loaded_format().checkpoint.modules()
        found = self._stored_modules(prefix)
        if any(module in modules for module in found):
            return found
        return self._stored_modules(stored_prefix(prefix, modules))

    def _stored_modules(self, prefix: str) -> tuple[str, ...]:
        modules = self._loaded_format().checkpoint.modules()
        own = self.renamed_modules.get(prefix, prefix)
        parent, _, name = prefix.rpartition(".")
        stacked = [
            f"{parent}.{part}" if parent else part
            for part in self.packed_modules_mapping.get(name, ())
        ]
        found = tuple(self.renamed_modules.get(part, part) for part in stacked)
        return found if own not in modules and any(m in modules for m in found) else (own,)

    def worker_document(self) -> dict[str, Any]:
        """The live report of this process, for `collective_rpc`."""
        if self._worker is None:
            raise UnsupportedCheckpoint("this process has built no fused layer")
        return self._worker.document()

    def _loaded_format(self) -> "CheckpointFormat":
        if self.format is None:
            raise UnsupportedCheckpoint(
                "--quantization fusedq needs a quantized checkpoint of its own; "
                "this vLLM did not announce one before building the model"
            )
        return self.format

    def _worker_state(self) -> "WorkerState":
        """Once per worker, before any layer exists."""
        if self._worker is None:
            from vllm_fusedq.integration.worker import start_worker

            self._worker = start_worker(self, self._loaded_format().checkpoint)
        return self._worker


def parameter_name(tensor: str) -> str:
    """What the vLLM layer calls a checkpoint tensor; torch allows no dots."""
    return tensor.replace(".", "_")
