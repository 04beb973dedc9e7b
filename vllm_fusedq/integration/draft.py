"""Speculative decoding: which draft models are served, and what vLLM calls their modules."""

import re
from collections.abc import Collection
from typing import Any

from vllm_fusedq.errors import UnsupportedCheckpoint

# What vLLM puts before the names of a separate draft model.
DRAFT_PREFIX = "draft_model."
# Lists of extra blocks that vLLM numbers as if they followed those of the model (MiMo, ERNIE).
MTP_BLOCKS = ("mtp_layers", "mtp_block")

_LAYER = re.compile(r"(.*\.|)layers\.(\d+)(\..+)")


def stored_prefix(prefix: str, modules: Collection[str]) -> str:
    """The checkpoint's name for the prefix that vLLM gives a module of a draft model.

    Args:
        prefix: like "draft_model.model.layers.0.mlp.down_proj", or "model.layers.28.mlp.down_proj"
            for the first block of multi-token prediction behind 28 blocks.
        modules: all of the checkpoint.
    """
    prefix = prefix.removeprefix(DRAFT_PREFIX)
    match = _LAYER.fullmatch(prefix)
    if match is None:
        return prefix
    before, index, rest = match[1], int(match[2]), match[3]
    blocks = {int(m[2]) for name in modules if (m := _LAYER.fullmatch(name)) and m[1] == before}
    behind = index - max(blocks, default=-1) - 1
    lists = {name.removeprefix(before).partition(".")[0] for name in modules}
    extra = [name for name in MTP_BLOCKS if name in lists]
    return f"{before}{extra[0]}.{behind}{rest}" if behind >= 0 and extra else prefix


def check_draft(speculative_config: Any) -> None:
    """Refuse a draft model that is quantized and would not run fused.

    Raises:
        UnsupportedCheckpoint: vLLM would run it by a method of its own, or it is of a kind whose
            quantized layers have no names that are known here.
    """
    draft = getattr(speculative_config, "draft_model_config", None)
    target = getattr(speculative_config, "target_model_config", None)
    if draft is None or draft.quantization is None:
        return
    if draft.quantization != "fusedq":
        raise UnsupportedCheckpoint(
            f"{draft.model}: found a draft model with quantization {draft.quantization}; "
            "supported: draft models that are unquantized or run fused themselves; add "
            '"quantization": "fusedq" to --speculative-config'
        )
    # Multi-token prediction reads the target's checkpoint again; prompt lookup reads none
    if draft.model != target.model and speculative_config.method != "draft_model":
        raise UnsupportedCheckpoint(
            f"{draft.model}: found a quantized draft model of the method "
            f"{speculative_config.method}; supported: quantized draft models of the methods "
            "draft_model and mtp; use an unquantized one"
        )


def is_draft(vllm_config: Any, quant_config: object) -> bool:
    """Whether `quant_config` is that of a draft model beside the model that is served."""
    if vllm_config.speculative_config is None:
        return False
    # Some drafts are built under the configuration of the model that is served
    own = vllm_config.quant_config is quant_config
    return not own or vllm_config.model_config.runner_type == "draft"
