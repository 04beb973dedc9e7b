"""One random linear layer as each format stores it at each width, for loading speed."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fusedq_kernels.types import WeightType

Tensors = dict[str, torch.Tensor]


class RandomLayer(NamedTuple):
    """`config` is the quantization config, `tensors` are the layer's own, by suffix."""

    name: str
    config: dict[str, object]
    tensors: Tensors


def random_layers(n: int, k: int, group_size: int) -> Iterator[RandomLayer]:
    """Every packing and width that is decoded by code of its own; every code equally likely."""
    for bits in (2, 3, 4, 8):
        yield _gptq(n, k, group_size, bits)
    yield _gptq(n, k, group_size, 4, symmetric=False)
    yield _gptq(n, k, group_size, 4, ordered=True)
    for bits in (2, 3, 4, 5, 6, 7, 8):
        yield _awq(n, k, group_size, bits)
    yield _awq_gemv(n, k, group_size)
    yield _awq_gemv_fast(n, k, group_size)
    for bits in (2, 3, 4, 5, 6, 7, 8):
        yield _pack_quantized(n, k, group_size, bits, "0.18.0")
    yield _pack_quantized(n, k, group_size, 3, "0.17.1")
    yield _pack_quantized(n, k, group_size, 4, "0.18.0", symmetric=False)
    yield _int_quantized(n, k, group_size)
    for nested in (False, True):
        yield _nf4(n, k, nested)


def _words(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max + 1, shape, dtype=torch.int64).to(dtype)


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape).half() * 0.01 + 0.01


def _gptq(
    n: int, k: int, group_size: int, bits: int, symmetric: bool = True, ordered: bool = False
) -> RandomLayer:
    groups = k // group_size
    zeros = _words(groups, n * bits // 32)
    if symmetric:
        constant = sum(1 << i for i in range(bits - 1, 32 * bits, bits))
        words = [(constant >> (32 * i)) & 0xFFFFFFFF for i in range(bits)]
        row = torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)
        zeros = row.repeat(groups, n // 32)
    g_idx = torch.arange(k) // group_size
    tensors = {
        "qweight": _words(k * bits // 32, n),
        "qzeros": zeros,
        "scales": _scales(groups, n),
        "g_idx": (g_idx[torch.randperm(k)] if ordered else g_idx).int(),
    }
    config = {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": ordered}
    config |= {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
    kind = f"{' zero points' * (not symmetric)}{' act-order' * ordered}"
    return RandomLayer(f"gptq {bits}-bit{kind}", config, tensors)


def _awq(n: int, k: int, group_size: int, bits: int) -> RandomLayer:
    groups = k // group_size
    tensors = {
        "qweight": _words(k, n * bits // 32),
        "qzeros": _words(groups, n * bits // 32),
        "scales": _scales(groups, n),
    }
    config = {"quant_method": "awq", "bits": bits, "group_size": group_size, "version": "gemm"}
    config["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    return RandomLayer(f"awq gemm {bits}-bit", config, tensors)


def _awq_gemv(n: int, k: int, group_size: int) -> RandomLayer:
    words = -(-k // group_size // 8)
    tensors = {
        "qweight": _words(n, k // 8),
        "qzeros": _words(n, words),
        "scales": _scales(n, 8 * words),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemv"}
    return RandomLayer("awq gemv 4-bit", config, tensors)


def _awq_gemv_fast(n: int, k: int, group_size: int) -> RandomLayer:
    groups = 8 * -(-k // group_size // 8)
    scales = _scales(groups, n)
    tensors = {
        "qweight": _words(n // 4, k, dtype=torch.int16),
        "qzeros": -scales * torch.randint(0, 16, scales.shape),
        "scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemv_fast"}
    return RandomLayer("awq gemv_fast 4-bit", config, tensors)


def _pack_quantized(
    n: int, k: int, group_size: int, bits: int, version: str, symmetric: bool = True
) -> RandomLayer:
    per_word, padded = 32 // bits, version < "0.18"
    tensors = {
        "weight_packed": _words(n, -(-k // per_word) if padded else k * bits // 32),
        "weight_scale": _scales(n, k // group_size),
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _words(n * bits // 32, k // group_size)
    config = _compressed_config("pack-quantized", bits, group_size, symmetric) | {
        "version": version
    }
    kind = f"{' padded' * padded}{' zero points' * (not symmetric)}"
    return RandomLayer(f"pack-quantized {bits}-bit{kind}", config, tensors)


def _int_quantized(n: int, k: int, group_size: int) -> RandomLayer:
    tensors = {
        "weight": _words(n, k, dtype=torch.int8),
        "weight_scale": _scales(n, k // group_size),
    }
    config = _compressed_config("int-quantized", 8, group_size, True)
    return RandomLayer("int-quantized 8-bit", config, tensors)


def _compressed_config(
    packing: str, bits: int, group_size: int, symmetric: bool
) -> dict[str, object]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": group_size}}
    method = {"quant_method": "compressed-tensors", "format": packing}
    return {**method, "config_groups": {"group_0": group}}


def _nf4(n: int, k: int, nested: bool, blocksize: int = 64) -> RandomLayer:
    blocks = n * k // blocksize
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": [n, k]}
    tensors = {
        "weight": _words(n * k // 2, 1, dtype=torch.uint8),
        "weight.quant_map": torch.tensor(WeightType.NF4.codebook),
        "weight.absmax": torch.rand(blocks) * 0.01 + 0.01,
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors["weight.absmax"] = _words(blocks, dtype=torch.uint8)
        tensors["weight.nested_absmax"] = torch.rand(-(-blocks // 256)) * 0.1 + 0.1
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = text
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config["bnb_4bit_use_double_quant"] = nested
    return RandomLayer(f"bitsandbytes nf4{' double quantization' * nested}", config, tensors)
