"""vllm-fusedq: weight-only quantized checkpoints in vLLM, fused on every layer or not served.

Importing this package imports neither vLLM, torch nor Triton: vLLM imports it in every process.
"""

__version__ = "0.2.0"

__all__ = ["__version__", "register"]


def register() -> None:
    """Register `--quantization fusedq` with vLLM (entry point `vllm.general_plugins`).

    Idempotent, patches nothing, and never raises: an exception here would kill every vLLM
    process, also for models that have nothing to do with this plugin.
    """
    from vllm_fusedq.integration.register import register_plugin

    register_plugin()
