"""Config and file that disagree about a module: refused, with what the file proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import PreflightError

_AGREEMENT = "config and tensors that agree"


def packed_though_excluded(module: str, packed: Sequence[str], setting: str) -> PreflightError:
    """The file proves by tensors `packed` that the module is quantized, `setting` denies it."""
    found = (
        f"packed tensors ({', '.join(packed)}) although the config leaves this module unquantized"
    )
    return PreflightError.single(module, found, _AGREEMENT, f"correct {setting} in the config")


def check_plain(module: str, stored: Mapping[str, TensorInfo], setting: str) -> None:
    """Refuse a matrix of which the config says that it is quantized, and the file does not."""
    weight = stored.get("weight")
    if weight is not None and len(weight.shape) != 2:
        return
    tensors = (
        f"an unquantized weight {weight.dtype} {list(weight.shape)}"
        if weight is not None
        else f"no packed tensors (found: {', '.join(sorted(stored)) or 'none'})"
    )
    found = f"{tensors} although the config says that this module is quantized"
    fix = f"exclude it by {setting} if it is meant to stay unquantized"
    raise PreflightError.single(module, found, _AGREEMENT, fix)


def tied_though_quantized(module: str) -> PreflightError:
    """vLLM uses the embeddings as lm_head where they are tied, whatever else is stored."""
    return PreflightError.single(
        module,
        "a quantized lm_head although tie_word_embeddings is true in config.json",
        "a quantized lm_head of its own",
        "set tie_word_embeddings to false in config.json if the lm_head was trained or "
        "quantized apart",
    )
