"""Weights that were quantized for quantized activations, which no kernel here makes."""

from collections.abc import Sequence

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import USE_VLLM
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.plan.shards import LayerShard


def check_activations(shard: LayerShard, formats: Sequence[LayerFormat]) -> None:
    """Refuse them: that they multiply activations in 16 bits takes the user's consent."""
    if found := next((each.activations for each in formats if each.activations), ""):
        raise PreflightError.single(
            layer=shard.name,
            found=f"quantized activations ({found}) beside quantized weights",
            supported="activations in 16 bits",
            fix='set "activations": "16-bit" in additional-config "fusedq" (--activations 16-bit '
            "of the fusedq commands) to serve the weights alone, quantize the model again with a "
            f"weight-only scheme, or {USE_VLLM}",
        )
