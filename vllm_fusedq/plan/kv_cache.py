"""What a checkpoint's KV-cache scheme and scales mean for vLLM's attention layers, or why nothing.

vLLM holds and reads the cache; its own method takes one scale per tensor of 8-bit floats (e4m3).
"""

from collections.abc import Iterator, Mapping
from math import prod

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.kv_cache import (
    KV_CACHE_SCHEME,
    SCALES,
    SHARED_SCALE,
    ZERO_POINTS,
)
from vllm_fusedq.names import first_number, stored_modules, unnumbered

FP8 = "fp8"
"""The cache that vLLM makes of "auto" where the config has a `kv_cache_scheme`."""

SCALED_DTYPES = (FP8, "fp8_e4m3")
UNSCALED_DTYPES = ("auto", "bfloat16", "float16")
FLOATS = ("F32", "BF16", "F16")
_A_PAIR = "one scale for all keys of a layer and one for all its values (k_scale, v_scale)"
_WITHOUT = (
    f"quantize again with one static scale per tensor, or set {KV_CACHE_SCHEME} to null in the "
    "config and remove these tensors to serve with a 16-bit KV cache"
)


def served_kv_dtype(fmt: CheckpointFormat, asked: str) -> str:
    """The `--kv-cache-dtype` that vLLM serves where `asked` is what it is told."""
    return FP8 if asked == "auto" and fmt.kv_cache_scheme else asked


def kv_cache_summary(fmt: CheckpointFormat) -> str:
    """The KV cache in a line; "" where the checkpoint says nothing of it."""
    if not fmt.kv_tensors:
        return ""
    scales = f"k and v scales of {len(fmt.kv_tensors)} attention layers, one per tensor"
    if fmt.kv_cache_scheme:
        return f"fp8 KV cache (--kv-cache-dtype auto, by {KV_CACHE_SCHEME}): {scales}"
    return f"{scales}: --kv-cache-dtype fp8 applies them, auto does not"


def kv_cache_problems(fmt: CheckpointFormat) -> list[Problem]:
    """Why vLLM's own method could not take the scales exactly."""
    checkpoint, stored = fmt.checkpoint, fmt.kv_tensors
    if not stored:
        return [_no_scales(checkpoint)] if fmt.kv_cache_scheme else []
    if checkpoint.number("kv_lora_rank"):
        return [_latent(checkpoint)]
    problems = [each for name, parts in stored.items() for each in _of_layer(name, parts)]
    return problems + [
        Problem(
            layer=name,
            found="no k_scale and v_scale although other layers have them",
            supported="scales for every attention layer, or for none",
            fix="download the checkpoint again or quantize the model again",
        )
        for name in _siblings_without(checkpoint, stored)
    ]


def kv_dtype_problems(fmt: CheckpointFormat, asked: str) -> list[Problem]:
    """Why the scales cannot be used with `--kv-cache-dtype` `asked`."""
    if asked in (*SCALED_DTYPES, *UNSCALED_DTYPES) or not fmt.kv_tensors:
        return []
    problem = Problem(
        layer=fmt.checkpoint.path,
        found=f"--kv-cache-dtype {asked} beside scales that were made for fp8_e4m3",
        supported=f"--kv-cache-dtype {', '.join((*UNSCALED_DTYPES, *SCALED_DTYPES))}",
        fix="leave --kv-cache-dtype out, or take one of these",
    )
    return [problem]


def scaled_attention(
    prefix: str, fmt: CheckpointFormat, renamed_modules: Mapping[str, str]
) -> str | None:
    """The attention module of the checkpoint whose scales vLLM's layer `prefix` is to be given.

    None where the checkpoint has none for it, as for blocks of multi-token prediction.

    Raises:
        PreflightError: the same block has scales, and their names are not the layer's.
    """
    stored = fmt.kv_tensors
    found = stored_modules(prefix.removesuffix(".attn"), stored, renamed_modules, {})[0]
    if found in stored:
        return found
    of_block = [name for name in stored if first_number(name) == first_number(prefix)]
    if not of_block:
        return None
    raise PreflightError.single(
        layer=prefix,
        found=f"k and v scales named after {of_block[0]}, which is no layer of vLLM's model",
        supported="scales named after the attention layer that they belong to",
        fix=USE_VLLM,
    )


def _of_layer(name: str, parts: Mapping[str, list[TensorInfo]]) -> Iterator[Problem]:
    """What keeps an attention module's tensors from being one scale for keys, one for values."""
    for part, (info, *others) in parts.items():
        if part not in (*SCALES, *ZERO_POINTS, SHARED_SCALE):
            yield Problem(name, f"{part} (quantized queries or attention)", _A_PAIR, _WITHOUT)
        elif others:
            yield Problem(name, f"{part} twice: {info.name}, {others[0].name}", _A_PAIR, _WITHOUT)
        elif prod(info.shape) != 1:
            several = f"{part} of shape {list(info.shape)} (scales per head, channel or token)"
            yield Problem(name, several, _A_PAIR, _WITHOUT)
        elif part not in ZERO_POINTS and info.dtype not in FLOATS:
            yield Problem(name, f"{part} stored as {info.dtype}", " or ".join(FLOATS), _WITHOUT)
    scales = sorted({*SCALES, SHARED_SCALE} & parts.keys())
    if not scales:
        yield Problem(name, "zero points without scales", _A_PAIR, _WITHOUT)
    elif scales not in ([*SCALES], [SHARED_SCALE]):
        yield Problem(name, f"scales named {' and '.join(scales)} and no others", _A_PAIR, _WITHOUT)


def _siblings_without(checkpoint: Checkpoint, stored: Mapping[str, object]) -> list[str]:
    """Modules of the decoder that are named like those with scales but for their number."""
    kinds, blocks = {unnumbered(name) for name in stored}, checkpoint.number("num_hidden_layers")
    found = {}
    for module in checkpoint.modules():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            in_decoder = blocks is None or (first_number(name) or 0) < blocks
            if name not in stored and unnumbered(name) in kinds and in_decoder:
                found[name] = None
    return list(found)


def _no_scales(checkpoint: Checkpoint) -> Problem:
    return Problem(
        layer=checkpoint.path,
        found=f"{KV_CACHE_SCHEME} in the config and no k_scale or v_scale in the file",
        supported=_A_PAIR,
        fix=f"set {KV_CACHE_SCHEME} to null in the config to serve with a 16-bit KV cache, or "
        "download the checkpoint again",
    )


def _latent(checkpoint: Checkpoint) -> Problem:
    return Problem(
        layer=checkpoint.path,
        found="k and v scales for multi-head latent attention (kv_lora_rank)",
        supported="scales for attention that caches keys and values",
        fix=_WITHOUT,
    )
