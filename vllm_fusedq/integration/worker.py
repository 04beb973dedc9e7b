"""What one vLLM worker process knows of its fused layers, as they are created and loaded."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import __version__ as VLLM_VERSION
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from fusedq_kernels.heuristics import kernels_for
from fusedq_kernels.types import KernelName
from vllm_fusedq.checkpoint import Checkpoint
from vllm_fusedq.formats import Finding, settle
from vllm_fusedq.integration.devices import worker_device
from vllm_fusedq.integration.draft import check_draft, is_draft
from vllm_fusedq.integration.versions import batch_invariant
from vllm_fusedq.integration.worker_methods import install_worker_methods
from vllm_fusedq.live import LiveReport, WorkerRank
from vllm_fusedq.load import LayerLoader
from vllm_fusedq.plan import LayerPlan, Target
from vllm_fusedq.preflight import plan_model
from vllm_fusedq.settings import Settings, parse_settings

if TYPE_CHECKING:
    from vllm_fusedq.integration.config import FusedQConfig

logger = logging.getLogger("vllm.fusedq")


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
        draft: bool = False,
    ) -> None:
        self.target = target
        self.settings = settings
        self.message_file = message_file
        self.plans: list[LayerPlan] = []
        self.unquantized: tuple[str, ...] = ()
        self.draft = draft
        self._findings: dict[str, Finding] = {}
        self.live = LiveReport(target, model, rank or WorkerRank(), max_tokens)

    def layer_loaded(self, loader: LayerLoader, has_bias: bool) -> None:
        """Take note of a finished layer; after the last one, warm up and report.

        Layers of multi-token prediction are created after that: then there is a second last one.

        Raises:
            WeightLoadError: the layers contradict each other about how they were stored.
        """
        if any(known is loader for known in self.live.loaders):
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

                path = self.live.rank.report_file(Path(self.settings.report), self.draft)
                write_document(path, self.document())

    def document(self) -> dict[str, Any]:
        return self.live.document(self.plans, self.unquantized, VLLM_VERSION)


def start_worker(config: "FusedQConfig", checkpoint: Checkpoint) -> WorkerState:
    """Plan the whole model at this process's rank and size, before any layer exists.

    Raises:
        UnsupportedCheckpoint: a draft model beside it would not run fused.
        PreflightError: what the tensor-parallel size or the device makes unsupported.
        SettingsError: unknown or wrong settings.
    """
    vllm_config = get_current_vllm_config()
    check_draft(vllm_config.speculative_config)
    settings = parse_settings(vllm_config.additional_config.get("fusedq", {}))
    device = settings.device(worker_device())
    striped = kernels_for(device)[0] is KernelName.CPU_STRIPED
    if striped and settings.kernel == "auto":
        logger.warning(
            "This build of vLLM has no fused CPU operator: quantized layers run on "
            "cpu-striped, which is several times slower."
        )
    target = Target(
        *(device, vllm_config.model_config.dtype, settings.insisted),
        batch_invariant=batch_invariant(),
        sliced_prefill=settings.sliced_prefill,
    )
    install_worker_methods()
    state = WorkerState(
        *(target, settings, config.message_file),
        model=checkpoint.path,
        rank=_worker_rank(vllm_config),
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        draft=is_draft(vllm_config, config),
    )
    plan = plan_model(checkpoint, target, get_tensor_model_parallel_world_size())
    state.unquantized = plan.unquantized
    return state


def _worker_rank(vllm_config: Any) -> WorkerRank:
    parallel = vllm_config.parallel_config
    return WorkerRank(
        tensor=get_tensor_model_parallel_rank(),
        tensor_size=get_tensor_model_parallel_world_size(),
        pipeline=get_pp_group().rank_in_group,
        pipeline_size=parallel.pipeline_parallel_size,
        data=parallel.data_parallel_rank,
    )
