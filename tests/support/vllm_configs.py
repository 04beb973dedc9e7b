"""vLLM's configuration around layers that a test builds by itself."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def current_config() -> Iterator[None]:
    """A default configuration; for a CPU where vLLM finds no device, as its CUDA build may."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_unspecified() else "auto"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device=device))):
        yield
