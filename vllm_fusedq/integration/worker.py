"""What one vLLM worker process plans, before any of its layers exists."""

import logging
from functools import partial
from pathlib import Path

from vllm import __version__ as VLLM_VERSION
from vllm import envs
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.model_loader.utils import get_model_architecture

from fusedq_kernels.catalogue import KERNELS, Kernel
from fusedq_kernels.types import Policy
from vllm_fusedq.checkpoint.hub import REPOSITORY_ID
from vllm_fusedq.checkpoint.read import INDEX_FILE, OTHER_FORMAT, Checkpoint
from vllm_fusedq.errors import KernelError, UnsupportedCheckpoint
from vllm_fusedq.integration.devices import worker_device
from vllm_fusedq.integration.draft import check_draft, is_draft, model_config_of
from vllm_fusedq.integration.worker_methods import install_worker_methods
from vllm_fusedq.load.provenance import StoredTensors
from vllm_fusedq.plan.experts import ExpertSplit
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.settings import parse_settings
from vllm_fusedq.worker.state import WorkerRank, WorkerState

logger = logging.getLogger("vllm.fusedq")


def start_worker(
    checkpoint: Checkpoint, quant_config: object, message_file: str | None
) -> WorkerState:
    """Plan the whole model at this process's rank and size, before any layer exists.

    `quant_config` is vLLM's object of this model, which a draft model beside it does not share.

    Raises:
        UnsupportedCheckpoint: a draft model beside it would not run fused, or vLLM would load other
            files than those that were planned.
        PreflightError: what the tensor-parallel size or the device makes unsupported.
        SettingsError: unknown or wrong settings.
    """
    vllm_config = get_current_vllm_config()
    check_draft(vllm_config.speculative_config)
    _check_load_format(checkpoint, vllm_config.load_config.load_format)
    settings = parse_settings(vllm_config.additional_config.get("fusedq", {}))
    device = settings.planned_device(worker_device())
    target = Target(
        device,
        vllm_config.model_config.dtype,
        settings.insisted,
        Policy(envs.VLLM_BATCH_INVARIANT, settings.sliced_prefill),
        settings.keeps_activations,
        settings.experimental,
    )
    install_worker_methods()
    model_config = model_config_of(vllm_config, quant_config)
    _warn_of_unread_code(model_config)
    rank = _worker_rank(vllm_config)
    plan = plan_model(checkpoint, target, rank.tensor_size, split=_expert_split(vllm_config))
    for name in {use.call.kernel for layer in plan.layers for use in layer.uses}:
        _make_ready(KERNELS[name])
    downloaded = model_config.revision, vllm_config.load_config.download_dir
    return WorkerState(
        target,
        settings,
        message_file,
        model=checkpoint.path,
        rank=rank,
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        draft=is_draft(vllm_config, quant_config),
        vllm_version=VLLM_VERSION,
        unquantized=plan.unquantized,
        source=StoredTensors(checkpoint, partial(_downloaded, checkpoint.path, *downloaded)),
    )


def _make_ready(kernel: Kernel) -> None:
    """Raises KernelError where it cannot be compiled."""
    try:
        kernel.ready()
    except RuntimeError as error:
        raise KernelError(str(error)) from error


def _check_load_format(checkpoint: Checkpoint, load_format: str) -> None:
    others = [name for name in checkpoint.unread if name.startswith(OTHER_FORMAT)]
    if others and load_format == "auto":
        raise UnsupportedCheckpoint(
            f"{checkpoint.path}: found {others[0]} beside the model, which vLLM loads in its place "
            f"by --load-format auto; supported: the files of {INDEX_FILE}; serve with "
            "--load-format safetensors"
        )


def _warn_of_unread_code(model_config: ModelConfig) -> None:
    """`plan/model_code.py` was written from vLLM's own model classes."""
    model_class, _ = get_model_architecture(model_config)
    if model_class.__module__.partition(".")[0] != "vllm":
        logger.warning(
            "%s.%s is a model class from outside of vLLM. What its code does to quantized tensors "
            "while loading is checked; what it does to plain weights alone is not known. Compare "
            "its answers with those of the unquantized model.",
            *(model_class.__module__, model_class.__name__),
        )


def _downloaded(model: str, revision: str | None, cache: str | None, file: str) -> Path | None:
    """Where a file of the directory or repository `model` is once vLLM has the weights."""
    from huggingface_hub import try_to_load_from_cache

    if (path := Path(model) / file).is_file():
        return path
    if not REPOSITORY_ID.fullmatch(model):
        return None
    found = try_to_load_from_cache(model, file, cache, revision)
    return Path(found) if isinstance(found, str) else None


def _expert_split(vllm_config: VllmConfig) -> ExpertSplit:
    parallel = vllm_config.parallel_config
    ranks = parallel.data_parallel_size * parallel.tensor_parallel_size
    spread = parallel.enable_expert_parallel and ranks > 1
    return ExpertSplit(spread, parallel.data_parallel_size)


def _worker_rank(vllm_config: VllmConfig) -> WorkerRank:
    parallel = vllm_config.parallel_config
    return WorkerRank(
        tensor=get_tensor_model_parallel_rank(),
        tensor_size=get_tensor_model_parallel_world_size(),
        pipeline=get_pp_group().rank_in_group,
        pipeline_size=parallel.pipeline_parallel_size,
        data=parallel.data_parallel_rank,
    )
