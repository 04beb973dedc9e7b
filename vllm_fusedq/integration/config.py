"""`--quantization fusedq`: vLLM's configuration hooks, each delegating to the planner."""

import logging
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops  # noqa: F401  (registers the CPU operators that planning looks for)
from vllm import __version__ as VLLM_VERSION
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from fusedq_kernels.cpu import wna16_available
from fusedq_kernels.device import cpu_device, current_device, device_by_name
from fusedq_kernels.heuristics import kernels_for
from fusedq_kernels.types import DeviceSpec, KernelName
from vllm_fusedq.checkpoint import Checkpoint, read_checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.formats import Finding, format_for, settle
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.integration.last_words import open_message_file, speaking_last
from vllm_fusedq.integration.versions import batch_invariant
from vllm_fusedq.integration.worker_methods import install_worker_methods
from vllm_fusedq.live import LiveReport, WorkerRank
from vllm_fusedq.load import LayerLoader
from vllm_fusedq.plan import LayerPlan, Target
from vllm_fusedq.preflight import plan_model
from vllm_fusedq.settings import Settings, parse_settings

logger = logging.getLogger("vllm.fusedq")


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
        self.checkpoint = read_checkpoint(model_name, revision)
        self.format = format_for(self.checkpoint)
        plan_model(self.checkpoint, Target(_announced_device(), torch.bfloat16))
        self.message_file = open_message_file()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        modules = list(self._loaded_format().checkpoint.modules())
        for module in modules:
            for renamed in hf_to_vllm_mapper.apply_list([module]):
                self.renamed_modules[renamed] = module

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Fused where the checkpoint is quantized, vLLM's own method where it is not."""
        head = isinstance(layer, ParallelLMHead)
        if not head and not isinstance(layer, LinearBase):
            return None
        with speaking_last(self.message_file):
            state = self._worker_state()
            modules = self.modules_of(prefix)
            formats = {module: self._loaded_format().spec_for(module) for module in modules}
        if not any(formats.values()):
            return None if head else UnquantizedLinearMethod()
        from vllm_fusedq.integration.linear import FusedQLinearMethod

        return FusedQLinearMethod(state, prefix, modules, formats)

    def modules_of(self, prefix: str) -> tuple[str, ...]:
        """The checkpoint modules that vLLM stacks in its layer `prefix`, in order."""
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

    def _loaded_format(self) -> CheckpointFormat:
        if self.format is None:
            raise UnsupportedCheckpoint(
                "--quantization fusedq needs a quantized checkpoint of its own; "
                "this vLLM did not announce one before building the model"
            )
        return self.format

    def _worker_state(self) -> "WorkerState":
        """Once per worker, before any layer exists: the whole model at this TP size."""
        if self._worker is None:
            vllm_config = get_current_vllm_config()
            settings = parse_settings(vllm_config.additional_config.get(self.NAME, {}))
            device = settings.device(_worker_device())
            striped = kernels_for(device)[0] is KernelName.CPU_STRIPED
            if striped and settings.kernel == "auto":
                logger.warning(
                    "This build of vLLM has no fused CPU operator: quantized layers run on "
                    "cpu-striped, which is several times slower."
                )
            dtype = vllm_config.model_config.dtype
            target = Target(device, dtype, settings.insisted, batch_invariant())
            install_worker_methods()
            self._worker = WorkerState(
                *(target, settings, self.message_file),
                model=self._loaded_format().checkpoint.path,
                rank=_worker_rank(vllm_config),
                max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            )
            plan = plan_model(
                self._loaded_format().checkpoint, target, get_tensor_model_parallel_world_size()
            )
            self._worker.unquantized = plan.unquantized
        return self._worker


class WorkerState:
    """What one worker process knows: its target, and the layers as they are created and loaded."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        message_file: str | None,
        model: str = "",
        rank: WorkerRank | None = None,
        max_tokens: int = 1,
    ) -> None:
        self.target = target
        self.settings = settings
        self.message_file = message_file
        self.plans: list[LayerPlan] = []
        self.unquantized: tuple[str, ...] = ()
        self._findings: dict[str, Finding] = {}
        self.live = LiveReport(target, model, rank or WorkerRank(), max_tokens)

    def layer_loaded(self, loader: LayerLoader, has_bias: bool) -> None:
        """Take note of a finished layer; after the last one, warm up and report.

        Raises:
            WeightLoadError: the layers contradict each other about how they were stored.
        """
        if self.live.warmed is not None:
            return  # A weight update: nothing new to compile or to tell
        self._findings |= loader.findings
        self.live.add(loader, has_bias)
        if len(self.live.loaders) < len(self.plans):
            return
        note = settle(self._findings)
        self.live.finish()
        if self.live.rank.reports:
            if note:
                logger.warning(note)
            self.live.log(self.plans, self.unquantized)
            if self.settings.report is not None:
                # Tables cost every vLLM process 30 ms of import; only one engine prints one.
                from vllm_fusedq.report_json import write_document

                path = self.live.rank.report_file(Path(self.settings.report))
                write_document(path, self.document())

    def document(self) -> dict[str, Any]:
        return self.live.document(self.plans, self.unquantized, VLLM_VERSION)


def _worker_rank(vllm_config: Any) -> WorkerRank:
    parallel = vllm_config.parallel_config
    return WorkerRank(
        tensor=get_tensor_model_parallel_rank(),
        tensor_size=get_tensor_model_parallel_world_size(),
        pipeline=get_pp_group().rank_in_group,
        pipeline_size=parallel.pipeline_parallel_size,
        data=parallel.data_parallel_rank,
    )


def parameter_name(tensor: str) -> str:
    """What the vLLM layer calls a checkpoint tensor; torch allows no dots."""
    return tensor.replace(".", "_")


def _announced_device() -> DeviceSpec:
    """The device as the API process may know it: CUDA must not be initialised there."""
    if current_platform.is_cpu():
        return cpu_device(wna16_available())
    capability = current_platform.get_device_capability()
    return device_by_name(f"sm_{capability.major}{capability.minor}")


def _worker_device() -> DeviceSpec:
    device = torch.device("cpu") if current_platform.is_cpu() else torch.device("cuda")
    return current_device(device, wna16_available())
