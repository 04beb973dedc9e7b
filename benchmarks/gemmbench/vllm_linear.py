"""vLLM's own weight-only kernels, packed and called by vLLM's own code for compressed-tensors.

The layer is made as stock vLLM makes it (`CompressedTensorsWNA16`), with every other kernel
disabled, so that what is timed is what a user of that kernel gets.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedq_kernels.types import LogicalWeight
from gemmbench.contender import (
    Prepared,
    Unavailable,
    fused_dram_bytes,
    package_version,
    tensor_bytes,
)

_WORD_BITS = 32
# By default the CPU kernel quantizes activations to 8 bits.
_FULL_PRECISION = {"VLLM_CPU_INT4_W4A8": "0"}


@dataclass(frozen=True)
class VllmLinear:
    """One of vLLM's `MPLinearKernel` classes; `distribution` is what it needs beside vLLM."""

    name: str
    kernel: str
    distribution: str | None = None

    def version(self) -> str:
        versions = [package_version("vllm")]
        if self.distribution:
            versions.append(package_version(self.distribution))
        return ", ".join(versions)

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        spec = logical.spec
        if spec.weight_type.codebook is not None:
            raise Unavailable(f"{self.kernel} has no {spec.weight_type.value}")
        n, k = logical.codes.shape
        device = logical.codes.device
        layer = torch.nn.Module()
        layer.register_parameter("bias", None)
        layer.has_bias = False
        with _vllm_config(), self._alone(), device:
            scheme = _scheme(logical)
            try:
                scheme.create_weights(
                    layer=layer,
                    output_size=n,
                    input_size=k,
                    output_partition_sizes=[n],
                    input_size_per_partition=k,
                    params_dtype=act_dtype,
                    weight_loader=None,
                )
            except ValueError as error:
                lines = [line.strip() for line in str(error).splitlines()]
                own = [line for line in lines if self.kernel in line]
                reason = " ".join(own) or f"{self.kernel} is not for this platform"
                raise Unavailable(reason) from error
            _fill(layer, logical, act_dtype)
            scheme.process_weights_after_loading(layer)
        size = tensor_bytes(*layer.parameters(), *layer.buffers())
        chosen = type(scheme.kernel).__name__
        return Prepared(
            lambda x: scheme.apply_weights(layer, x, None),
            size,
            fused_dram_bytes(size, n, k),
            lambda m: chosen,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        from vllm.model_executor.kernels.linear import mixed_precision

        others = [name for name in mixed_precision.__all__ if name != self.kernel]
        settings = {"VLLM_DISABLED_KERNELS": ",".join(others), **_FULL_PRECISION}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _scheme(logical: LogicalWeight):
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    spec = logical.spec
    per_channel = spec.group_size == logical.codes.shape[1]
    return CompressedTensorsWNA16(
        strategy="channel" if per_channel else "group",
        num_bits=spec.weight_type.bits,
        group_size=None if per_channel else spec.group_size,
        symmetric=not spec.has_zero_points,
    )


def _fill(layer: torch.nn.Module, logical: LogicalWeight, act_dtype: torch.dtype) -> None:
    bits = logical.spec.weight_type.bits
    layer.weight_packed.data.copy_(pack_words(logical.codes, bits))
    layer.weight_scale.data.copy_(logical.scales.to(act_dtype))
    layer.weight_shape.data.copy_(torch.tensor(logical.codes.shape))
    if logical.zeros is not None:
        layer.weight_zero_point.data.copy_(pack_words(logical.zeros.t(), bits).t())


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 `[R, C]` as int32 `[R, C * bits / 32]`, the first code in the lowest bits."""
    per_word = _WORD_BITS // bits
    words = torch.zeros(
        (codes.shape[0], codes.shape[1] // per_word), dtype=torch.int32, device=codes.device
    )
    for i in range(per_word):
        words |= codes[:, i::per_word].to(torch.int32) << (i * bits)
    return words


@contextmanager
def _vllm_config() -> Iterator[None]:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(_single_rank_config()):
        yield


@functools.cache
def _single_rank_config() -> object:
    """A vLLM configuration, and the one-rank process group that vLLM's parameters ask for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.platforms import current_platform

    # Loads the compiled operators of the CPU build; the CUDA build loads its own on import.
    if current_platform.is_cpu():
        current_platform.import_kernels()
    config = VllmConfig()
    store = Path(tempfile.mkdtemp()) / "store"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
    return config


VLLM = (
    VllmLinear("marlin", "MarlinLinearKernel"),
    VllmLinear("machete", "MacheteLinearKernel"),
    VllmLinear("humming", "HummingLinearKernel", "humming-kernels"),
    VllmLinear("conch", "ConchLinearKernel", "conch-triton-kernels"),
    VllmLinear("vllm-triton", "TritonW4A16LinearKernel"),
    VllmLinear("vllm-cpu", "CPUWNA16LinearKernel"),
)
