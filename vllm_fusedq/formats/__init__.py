"""The checkpoint formats that are supported, by the `quant_method` of their config."""

from __future__ import annotations

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.formats.autoround import AutoRoundFormat
from vllm_fusedq.formats.awq import AwqFormat
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.bitsandbytes import BitsAndBytesFormat
from vllm_fusedq.formats.compressed_tensors import CompressedTensorsFormat
from vllm_fusedq.formats.fbgemm_fp8 import FbgemmFp8Format
from vllm_fusedq.formats.fp8 import Fp8Format
from vllm_fusedq.formats.fusedq import FusedQFormat
from vllm_fusedq.formats.gptq import GptqFormat
from vllm_fusedq.formats.layer import (
    Dim,
    LayerFormat,
    Region,
    TensorLayout,
    stored_slices,
)
from vllm_fusedq.formats.modelopt import ModelOptFormat
from vllm_fusedq.formats.packing import Packing
from vllm_fusedq.formats.quark import QuarkFormat
from vllm_fusedq.formats.shared.findings import Finding, settle

__all__ = [
    "FORMATS",
    "CheckpointFormat",
    "Dim",
    "Finding",
    "LayerFormat",
    "Packing",
    "Region",
    "TensorLayout",
    "format_for",
    "settle",
    "stored_slices",
]

FORMATS: dict[str, type[CheckpointFormat]] = {
    "awq": AwqFormat,
    "gptq": GptqFormat,
    "compressed-tensors": CompressedTensorsFormat,
    "auto-round": AutoRoundFormat,
    "bitsandbytes": BitsAndBytesFormat,
    "fp8": Fp8Format,
    "fbgemm_fp8": FbgemmFp8Format,
    "modelopt": ModelOptFormat,
    "quark": QuarkFormat,
    "fusedq": FusedQFormat,
}


def format_for(checkpoint: Checkpoint) -> CheckpointFormat:
    """The format of a checkpoint, its config checked.

    Raises:
        UnsupportedCheckpoint: the quantization method, or an option of it, is not supported.
    """
    method = checkpoint.quant_config.get("quant_method")
    for name, known in FORMATS.items():
        named = method == name or method in known.other_names
        if named or (method is None and checkpoint.quant_source in known.config_sources):
            return known.from_checkpoint(checkpoint)
    found = "no quant_method" if method is None else f"quant_method {method!r:.80}"
    raise UnsupportedCheckpoint(
        f"{checkpoint.path}: found {found} in {checkpoint.quant_source}; supported: "
        f"{', '.join(FORMATS)}; {USE_VLLM}"
    )
