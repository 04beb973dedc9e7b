"""Speculative decoding: which draft models are served."""

from typing import Any

from vllm_fusedq.errors import UnsupportedCheckpoint


def check_draft(speculative_config: Any) -> None:
    """Refuse a draft model that is quantized and would not run fused.

    Raises:
        UnsupportedCheckpoint: vLLM would run it by a method of its own, or it is of a kind whose
            quantized layers have no names that are known here.
    """
    if speculative_config is None:
        return
    draft, target = speculative_config.draft_model_config, speculative_config.target_model_config
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


def model_config_of(vllm_config: Any, quant_config: object) -> Any:
    """vLLM's configuration of the model that `quant_config` belongs to, the draft's or the other's.

    A draft may be built under the configuration of the model that is served; its revision is its
    own.
    """
    if is_draft(vllm_config, quant_config):
        return vllm_config.speculative_config.draft_model_config
    return vllm_config.model_config
