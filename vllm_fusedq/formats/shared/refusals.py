"""Config and file that disagree about a module: refused, with what the file proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.checkpoint.stacks import pieces_of, quantized_stacks
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.names import EXPERT_PARTS, expert_module, lies_in_experts

if TYPE_CHECKING:
    from vllm_fusedq.formats.base import CheckpointFormat

_EXPERT_NAMES = ", ".join(EXPERT_PARTS)
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
    # Cohere's norms of heads are matrices too
    if weight is not None and (len(weight.shape) != 2 or module.endswith("norm")):
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


def quantized_router(module: str, exclusion: str) -> PreflightError:
    """vLLM builds the gate that chooses experts without a quantization method."""
    return PreflightError.single(
        module,
        "a quantized router of experts",
        "routers left unquantized, as vLLM builds them",
        f"quantize again with this module excluded by {exclusion}",
    )


def quantized_vocabulary(module: str, packed: Sequence[str], other: str) -> PreflightError:
    """A matrix of the vocabulary that is not packed as linear layers are; `other` is a way out."""
    return PreflightError.single(
        module,
        f"a quantized embedding or lm_head ({', '.join(packed)})",
        "quantized linear layers, and an lm_head or (compressed-tensors) an input "
        "embedding where the config says so",
        f"quantize again without {module.rpartition('.')[2]}, or {other}",
    )


def check_stacks(fmt: CheckpointFormat) -> None:
    """Refuse tensors of all experts of a layer at once that no tool of this format writes.

    Raises:
        UnsupportedCheckpoint: naming one of them.
    """
    tensors = fmt.checkpoint.tensors
    whole = [info.name for each in quantized_stacks(tensors).values() for info in each.values()]
    told = [] if fmt.reads_stacks else list(pieces_of(tensors))
    if not (unread := whole + told):
        return
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    sizes = "" if told or not fmt.reads_stacks else ", whose tensors do not fit each other"
    supported = "experts that are stored one by one (experts.0.up_proj)"
    if fmt.reads_stacks:
        supported += ", or all of a layer by the first dimension of each of their tensors"
    raise fmt.refusal(
        f"tensors of all experts of a layer at once ({unread[0]}{more}){sizes}",
        supported,
        "quantize the model again with a tool that stores experts one by one",
    )


def check_expert(module: str) -> None:
    """Refuse a packed module among experts that is no matrix of a single one."""
    if not lies_in_experts(module):
        return
    expert = expert_module(module)
    if expert is None:
        raise PreflightError.single(
            module,
            "packed tensors of all experts of a layer at once",
            "experts that are stored one by one, as llm-compressor, GPTQModel and AutoAWQ write "
            "them (experts.0.up_proj)",
            "quantize again with a tool that stores experts one by one",
        )
    if expert.part is None:
        raise PreflightError.single(
            module,
            f"a quantized {expert.name} of an expert",
            f"an expert's {_EXPERT_NAMES}",
            "serve this model without --quantization fusedq",
        )
