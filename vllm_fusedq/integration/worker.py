"""What one vLLM worker process plans, before any of its layers exists."""

import logging
from typing import TYPE_CHECKING

from vllm import __version__ as VLLM_VERSION
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from fusedq_kernels.choose.heuristics import kernels_for
from fusedq_kernels.types import KernelName
from vllm_fusedq.checkpoint.read import INDEX_FILE, OTHER_FORMAT, Checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.integration.devices import worker_device
from vllm_fusedq.integration.draft import check_draft, is_draft
from vllm_fusedq.integration.worker_methods import install_worker_methods
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.settings import parse_settings
from vllm_fusedq.worker.state import WorkerRank, WorkerState

if TYPE_CHECKING:
    from vllm_fusedq.integration.config import FusedQConfig

logger = logging.getLogger("vllm.fusedq")


def start_worker(config: "FusedQConfig") -> WorkerState:
    """Plan the whole model at this process's rank and size, before any layer exists.

    Raises:
        UnsupportedCheckpoint: a draft model beside it would not run fused, or vLLM would load other
            files than those that were planned.
        PreflightError: what the tensor-parallel size or the device makes unsupported.
        SettingsError: unknown or wrong settings.
    """
    vllm_config = get_current_vllm_config()
    check_draft(vllm_config.speculative_config)
    checkpoint = config.format.checkpoint
    _check_load_format(checkpoint, vllm_config.load_config.load_format)
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
        batch_invariant=envs.VLLM_BATCH_INVARIANT,
        sliced_prefill=settings.sliced_prefill,
    )
    install_worker_methods()
    rank = _worker_rank(vllm_config)
    plan = plan_model(checkpoint, target, rank.tensor_size)
    return WorkerState(
        *(target, settings, config.message_file),
        model=checkpoint.path,
        rank=rank,
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        draft=is_draft(vllm_config, config),
        vllm_version=VLLM_VERSION,
        unquantized=plan.unquantized,
    )


def _check_load_format(checkpoint: Checkpoint, load_format: str) -> None:
    others = [name for name in checkpoint.unread if name.startswith(OTHER_FORMAT)]
    if others and load_format == "auto":
        raise UnsupportedCheckpoint(
            f"{checkpoint.path}: found {others[0]} beside the model, which vLLM loads in its place "
            f"by --load-format auto; supported: the files of {INDEX_FILE}; serve with "
            "--load-format safetensors"
        )


def _worker_rank(vllm_config: VllmConfig) -> WorkerRank:
    parallel = vllm_config.parallel_config
    return WorkerRank(
        tensor=get_tensor_model_parallel_rank(),
        tensor_size=get_tensor_model_parallel_world_size(),
        pipeline=get_pp_group().rank_in_group,
        pipeline_size=parallel.pipeline_parallel_size,
        data=parallel.data_parallel_rank,
    )
