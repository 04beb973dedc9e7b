"""Builds tiny, complete checkpoints of every format from known codes, scales and zero points.

The packers here follow the published layouts bit by bit and share nothing with the code under test.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a group of 8 that AutoAWQ puts into nibble 0, 1, ... of a word."""

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]


@dataclass(frozen=True)
class Truth:
    """What a quantized linear means: codes `[N, K]`, zeros `[N, G]` or None, scales `[N, G]`.

    `g_idx` `[K]` is the group of each in_feature; None means `k // group_size`.
    """

    codes: np.ndarray
    zeros: np.ndarray | None
    scales: torch.Tensor
    group_size: int
    g_idx: np.ndarray | None = None

    def values(self, n0: int, n1: int, k0: int, k1: int) -> torch.Tensor:
        """What a region is worth, fp64; exact."""
        group_of = np.arange(self.codes.shape[1]) // self.group_size
        group_of = (group_of if self.g_idx is None else self.g_idx)[k0:k1]
        zeros = 8 if self.zeros is None else self.zeros[n0:n1][:, group_of].astype(np.float64)
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].astype(np.float64) - zeros)
        return codes * self.scales[n0:n1][:, group_of].double()

    def slice(
        self, n0: int, n1: int, k0: int, k1: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Codes, zeros and scales of a region, with every group that it touches."""
        groups = slice(k0 // self.group_size, -(-k1 // self.group_size))
        zeros = None if self.zeros is None else torch.from_numpy(self.zeros[n0:n1, groups].copy())
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].copy())
        return codes, zeros, self.scales[n0:n1, groups].contiguous()


def random_truth(
    n: int,
    k: int,
    group_size: int,
    *,
    zero_range: tuple[int, int] | None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Truth:
    """Random codes, scales and, in `zero_range`, zero points; None makes a symmetric weight."""
    rng = np.random.default_rng(seed)
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    zeros = None
    if zero_range:
        zeros = rng.integers(zero_range[0], zero_range[1] + 1, (n, groups), dtype=np.uint8)
    return Truth(
        codes=rng.integers(0, 16, (n, k), dtype=np.uint8),
        zeros=zeros,
        scales=torch.from_numpy(rng.uniform(0.01, 0.02, (n, groups))).to(dtype),
        group_size=group_size,
    )


def pack_along_columns(codes: np.ndarray, columns: Sequence[int] = range(8)) -> torch.Tensor:
    """`[R, C]` to int32 `[R, ceil(C / 8)]`: nibble i of word w is column `8 * w + columns[i]`."""
    rows, width = codes.shape
    words = np.zeros((rows, -(-width // 8)), dtype=np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate(columns):
            source = 8 * word + column
            if source < width:
                words[:, word] |= codes[:, source].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def pack_along_rows(codes: np.ndarray) -> torch.Tensor:
    return pack_along_columns(np.ascontiguousarray(codes.T)).T.contiguous()


def awq_tensors(truth: Truth) -> Tensors:
    assert truth.zeros is not None
    return {
        "qweight": pack_along_columns(truth.codes.T, AWQ_COLUMNS),
        "qzeros": pack_along_columns(truth.zeros.T, AWQ_COLUMNS),
        "scales": truth.scales.T.contiguous(),
    }


def padded_groups(values: np.ndarray, group_size: int) -> np.ndarray:
    """`[N, G]` with zeros up to the width that AutoAWQ's gemv kernels read."""
    words = -(-values.shape[1] // 8)
    if group_size == 64:
        words += words % 2
    if group_size == 32:
        words += -words % 4
    return np.pad(values, ((0, 0), (0, 8 * words - values.shape[1])))


def awq_gemv_tensors(truth: Truth) -> Tensors:
    assert truth.zeros is not None
    scales = padded_groups(truth.scales.float().numpy(), truth.group_size)
    return {
        "qweight": pack_along_columns(truth.codes),
        "qzeros": pack_along_columns(padded_groups(truth.zeros, truth.group_size)),
        "scales": torch.from_numpy(scales).to(truth.scales.dtype),
    }


def awq_gemv_fast_tensors(truth: Truth) -> Tensors:
    assert truth.zeros is not None
    n, k = truth.codes.shape
    words = np.zeros((n // 4, k), dtype=np.uint16)
    for row in range(n):
        for column in range(k):
            block, within = divmod(column, 64)
            half, c = divmod(within, 32)
            # Pairs of columns 8 apart come together, then the even ones before the odd ones
            place = 32 * half + 8 * (c % 8 // 2) + 4 * (c % 2) + c // 8
            nibble = 64 * (row % 4) + place
            word = words[row // 4, 64 * block + nibble // 4 : 64 * block + nibble // 4 + 1]
            word |= np.uint16(int(truth.codes[row, column]) << 4 * (nibble % 4))
    scales = padded_groups(truth.scales.float().numpy(), truth.group_size)
    zeros = padded_groups(truth.zeros.astype(np.float32), truth.group_size)
    dtype = truth.scales.dtype
    return {
        "qweight": torch.from_numpy(words.view(np.int16)),
        "qzeros": torch.from_numpy((-scales * zeros).T.copy()).to(dtype),
        "scales": torch.from_numpy(scales.T.copy()).to(dtype),
    }


def gptq_tensors(truth: Truth, *, stored_minus_one: bool = True, g_idx: bool = True) -> Tensors:
    n, k = truth.codes.shape
    zeros = truth.zeros
    if zeros is None:
        zeros = np.full((n, truth.scales.shape[1]), 8, dtype=np.uint8)
    tensors = {
        "qweight": pack_along_rows(truth.codes.T),
        "qzeros": pack_along_columns(zeros.T - np.uint8(stored_minus_one)),
        "scales": truth.scales.T.contiguous(),
    }
    if truth.g_idx is not None:
        tensors["g_idx"] = torch.from_numpy(truth.g_idx.astype(np.int32))
    elif g_idx:
        tensors["g_idx"] = torch.tensor([i // truth.group_size for i in range(k)]).int()
    return tensors


def compressed_tensors_tensors(truth: Truth) -> Tensors:
    tensors = {
        "weight_packed": pack_along_columns(truth.codes),
        "weight_scale": truth.scales.clone(),
        "weight_shape": torch.tensor(truth.codes.shape),
    }
    if truth.zeros is not None:
        tensors["weight_zero_point"] = pack_along_rows(truth.zeros)
    if truth.g_idx is not None:
        tensors["weight_g_idx"] = torch.from_numpy(truth.g_idx.astype(np.int32))
    return tensors


@dataclass(frozen=True)
class Build:
    """One flavour of a format: how its tensors are stored and what its config says."""

    symmetric: bool
    tensors: Callable[[Truth], Tensors]
    config: Callable[[int], dict[str, Any]]
    zero_range: tuple[int, int] = (0, 15)
    ordered: bool = False

    def truth(
        self, n: int, k: int, group_size: int, seed: int = 0, dtype: torch.dtype = torch.float16
    ) -> Truth:
        zero_range = None if self.symmetric else self.zero_range
        truth = random_truth(n, k, group_size, zero_range=zero_range, seed=seed, dtype=dtype)
        if not self.ordered:
            return truth
        # Layers that read one activation have one order: GPTQ takes it from the activation
        order = np.random.default_rng(k).permutation(k)
        return with_fields(truth, g_idx=order // truth.group_size)


def awq_config(group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def awq_version(version: str) -> Callable[[int], dict[str, Any]]:
    return lambda group_size: {**awq_config(group_size), "version": version}


def gptq_config(
    group_size: int, *, sym: bool = True, version: str = "gptq", desc_act: bool = False
) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": version,
        "lm_head": False,
    }


def compressed_tensors_config(
    group_size: int, *, symmetric: bool = True, actorder: str | None = None
) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": actorder,
        "dynamic": False,
    }
    activations = {"input_activations": None, "output_activations": None}
    group = {"targets": ["Linear"], "weights": weights, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


BUILDS = {
    "awq": Build(False, awq_tensors, awq_config),
    "gptq-sym": Build(True, gptq_tensors, gptq_config),
    "gptq-sym-v2": Build(
        True,
        lambda truth: gptq_tensors(truth, stored_minus_one=False, g_idx=False),
        lambda g: gptq_config(g, version="gptq_v2"),
    ),
    "gptq-asym": Build(False, gptq_tensors, lambda g: gptq_config(g, sym=False), (1, 15)),
    "gptq-asym-v2": Build(
        False,
        lambda truth: gptq_tensors(truth, stored_minus_one=False),
        lambda g: gptq_config(g, sym=False, version="gptq_v2"),
    ),
    "ct-sym": Build(True, compressed_tensors_tensors, compressed_tensors_config),
    "ct-asym": Build(
        False,
        compressed_tensors_tensors,
        lambda g: compressed_tensors_config(g, symmetric=False),
    ),
}


AWQ_BUILDS = {
    "awq-gemv": Build(False, awq_gemv_tensors, awq_version("gemv")),
    "awq-gemv-fast": Build(False, awq_gemv_fast_tensors, awq_version("gemv_fast")),
}
"""AWQ's other packings, which take whole groups of 32, 64 or at least 128 only."""

ORDERED_BUILDS = {
    "gptq-sym-order": Build(
        True, gptq_tensors, lambda g: gptq_config(g, desc_act=True), ordered=True
    ),
    "gptq-asym-order": Build(
        False,
        lambda truth: gptq_tensors(truth, stored_minus_one=False),
        lambda g: gptq_config(g, sym=False, version="gptq_v2", desc_act=True),
        ordered=True,
    ),
    "ct-sym-order": Build(
        True,
        compressed_tensors_tensors,
        lambda g: compressed_tensors_config(g, actorder="group"),
        ordered=True,
    ),
    "ct-asym-order": Build(
        False,
        compressed_tensors_tensors,
        lambda g: compressed_tensors_config(g, symmetric=False, actorder="dynamic"),
        ordered=True,
    ),
}
"""Builds with activation reordering, whose rows are not resident in the order of the file."""


ALL_BUILDS = BUILDS | AWQ_BUILDS | ORDERED_BUILDS


def write_checkpoint(
    path: Path,
    build: str = "awq",
    *,
    layers: int = 1,
    hidden: int = 64,
    intermediate: int = 96,
    group_size: int = 32,
    dtype: torch.dtype = torch.float16,
    config: dict[str, Any] | None = None,
    edits: Iterable[Edit] = (),
) -> dict[str, Truth]:
    """Write a llama-like checkpoint; returns the truth of each quantized module.

    `config` overrides entries of the quantization config, `edits` change the tensors, by their full
    names, before they are written.
    """
    made = ALL_BUILDS[build]
    vocab = 32
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.zeros(vocab, hidden, dtype=dtype),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": torch.zeros(vocab, hidden, dtype=dtype),
    }
    shapes = {
        **{f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"},
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    truths: dict[str, Truth] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        for name, (n, k) in shapes.items():
            module = f"{prefix}.{name}"
            truths[module] = made.truth(n, k, group_size, seed=len(truths), dtype=dtype)
            for suffix, tensor in made.tensors(truths[module]).items():
                tensors[f"{module}.{suffix}"] = tensor
    for edit in edits:
        edit(tensors)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_json(
        path / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": vocab,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "quantization_config": {**made.config(group_size), **(config or {})},
        },
    )
    return truths


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def drop(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Replace one tensor by what `change` makes of it."""
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def add(name: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors: tensors.update({name: tensor})


def rename(old: str, new: str) -> Edit:
    """Rename every tensor of a module."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old + ".")]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return edit


def make_plain(module: str, n: int, k: int) -> Edit:
    """Replace a quantized module's tensors by an unquantized weight."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(module + ".")]:
            del tensors[name]
        tensors[f"{module}.weight"] = torch.zeros(n, k, dtype=torch.float16)

    return edit


def put(name: str, index: tuple[int, ...], value: float) -> Edit:
    """Overwrite one element, for example a scale by NaN or an entry of g_idx."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][index] = value

    return edit
