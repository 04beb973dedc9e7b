"""What a checkpoint says of its KV cache: `kv_cache_scheme` in its config, scales in its tensors.

Both mean the same beside every format of weights. An entry of the cache is stored as
`float8_e4m3(value / scale)`, with a scale for all keys of a layer and another for all its values.
Source: `get_cache_scale_mapper` of vLLM's quantization configs (base, fp8, quark), which name the
tensors, and compressed-tensors' `QuantizationArgs`, which is the scheme.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo

KV_CACHE_SCHEME = "kv_cache_scheme"
SCALES, ZERO_POINTS = ("k_scale", "v_scale"), ("k_zero_point", "v_zero_point")
SHARED_SCALE = "kv_scale"
"""An older spelling: one scale for keys and values."""

# vLLM's fp8 and quark configs alone rename these
OUTPUT_SCALES = {f".{part}_proj.output_scale": f".attn.{part}_scale" for part in "kv"}

_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
_SCHEME |= {"dynamic": False, "group_size": None, "block_structure": None}
# What compressed-tensors reads where an entry is left out
_DEFAULTS = {"symmetric": True, "dynamic": False}

# The attention module, and the letter of what the tensor belongs to
_SPELLINGS = [
    (re.compile(pattern), part)
    for pattern, part in (
        (r"(.*)\.(kv)_scale", "{}_scale"),
        (r"(.*\.self_attn)\.[kv]_proj\.([kv])_scale", "{}_scale"),
        (r"(.*\.self_attn)\.qk(?:qk)?v_proj\.([kv])_scale", "{}_scale"),
        (r"(.*\.mixer)\.[kv]_proj\.([kv])_scale", "{}_scale"),
        (r"(.*\.self_attn)\.(q)\.scale", "{}_scale"),
        (r"(.*\.self_attn)\.([kv])_cache\.scale", "{}_scale"),
        (r"(.*)\.([qkv])_proj\.output_scale", "{}_scale"),
        (r"(.*\.self_attn)\.(prob)_output_scale", "{}_scale"),
        (r"(.*?)(?:\.attn)?\.([qkv]|prob)_scale", "{}_scale"),
        (r"(.*?)(?:\.attn)?\.([qkv])_zero_point", "{}_zero_point"),
    )
]


# Most tensors are something else, and a checkpoint may have a hundred thousand
_LAST_NAMES = frozenset(
    {
        *("k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale"),
        *("scale", "output_scale", "prob_output_scale"),
        *("k_zero_point", "v_zero_point", "q_zero_point"),
    }
)


class KvTensor(NamedTuple):
    """Part `part` ("k_scale", "v_zero_point", ...) of the attention module `attention`."""

    attention: str
    part: str


def kv_tensor(name: str) -> KvTensor | None:
    """What a tensor of this full name says of a KV cache; None where it is something else."""
    if name.rpartition(".")[2] not in _LAST_NAMES:
        return None
    for pattern, part in _SPELLINGS:
        if match := pattern.fullmatch(name):
            return KvTensor(match[1], part.format(match[2]))
    return None


KvTensors = Mapping[str, Mapping[str, list[TensorInfo]]]
"""Attention module -> part -> the tensors that spell it, of which there should be one."""


def kv_tensors(checkpoint: Checkpoint) -> KvTensors:
    """The scales of the KV cache, and what else belongs to them."""
    found: dict[str, dict[str, list[TensorInfo]]] = defaultdict(dict)
    for info in checkpoint.tensors.values():
        if known := kv_tensor(info.name):
            found[known.attention].setdefault(known.part, []).append(info)
    return dict(found)


def scheme_deviation(scheme: Any) -> str:
    """What in a `kv_cache_scheme` is not one static scale per tensor of float8; "" if nothing."""
    if not isinstance(scheme, dict):
        return f"{scheme!r:.80} in place of an object"
    for key, expected in _SCHEME.items():
        found = scheme.get(key, _DEFAULTS.get(key))
        if type(found) is not type(expected) or found != expected:
            return f"{key} {found!r:.40}"
    return ""
