"""The body of the plugin entry point: tiny, idempotent, never raising."""

import logging

logger = logging.getLogger("vllm.fusedq")


def register_plugin() -> None:
    """Make `--quantization fusedq` known to vLLM, in every vLLM process."""
    try:
        _enable_amx()
        from vllm_fusedq.integration.versions import unsupported_version

        if reason := unsupported_version():
            logger.warning("vllm-fusedq is not active: %s.", reason)
            return
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_fusedq.integration.config import FusedQConfig

        register_quantization_config(FusedQConfig.NAME)(FusedQConfig)
    except Exception as error:
        # An exception here would kill every vLLM process, also for unrelated models.
        logger.warning("vllm-fusedq is not active: %s: %s", type(error).__name__, error)


def _enable_amx() -> None:
    """Ask the kernel for AMX tiles before vLLM's attention uses them.

    Linux grants the tile registers per process on request; vLLM's CPU attention never asks, and
    where nothing else did the process dies with SIGILL at its first attention call.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
