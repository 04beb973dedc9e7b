"""bitsandbytes 4-bit checkpoints (NF4, FP4) as transformers and bitsandbytes store them.

Everything runs over the flattened `[N, K]` weight. weight holds two codes per byte, the first in
the high nibble, in any shape and dtype of as many bytes (uint8 `[N * K / 2, 1]` by default). Each
block of `blocksize` weights has one absmax, and a weight is `quant_map[code] * absmax`.

weight.absmax is a float per block or, with double quantization, a uint8 code: then absmax is
`nested_quant_map[code] * nested_absmax[block // nested_blocksize] + nested_offset` in fp32.
weight.quant_state.bitsandbytes__nf4 (or fp4) is a JSON object as bytes, which alone knows N and K.
Source: `QuantState`, `dequantize_4bit` and `dequantize_blockwise` of bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight, WeightType
from vllm_fusedq.checkpoint.read import MAX_METADATA_BYTES
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.headers import REDO
from vllm_fusedq.formats.layer import (
    DTYPES,
    SCALE_DTYPES,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_finite,
    check_slices,
)
from vllm_fusedq.formats.packing import Packing
from vllm_fusedq.formats.shared.rows import Support
from vllm_fusedq.formats.shared.unpacking import take, unpack_columns

WEIGHT, ABSMAX, QUANT_MAP = "weight", "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
STATES = {
    "weight.quant_state.bitsandbytes__nf4": WeightType.NF4,
    "weight.quant_state.bitsandbytes__fp4": WeightType.FP4,
}
# What the tensors of a module are called where its weight itself is missing
ORPHANS = frozenset({"absmax", "quant_map"})

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# bnb_4bit_quant_storage only relabels the bytes of the codes
STORAGE_DTYPES = (DType.UINT8, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)
NESTED_MAP_SIZE = 256


class BitsAndBytesFormat(CheckpointFormat):
    """`quant_method: bitsandbytes`, 4 bits, already quantized."""

    name = "bitsandbytes"
    markers = frozenset({ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP, *STATES}) | ORPHANS
    support = (
        Support(
            "bitsandbytes NF4 and FP4, already quantized, with and without double quantization",
            "4 bits",
            "codebook",
            groups=f"blocks of {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}",
        ),
    )
    exclusion = "llm_int8_skip_modules"
    grouping = "the blocksize of bitsandbytes' quantize_4bit"

    def check_config(self) -> None:
        if self._is_set("load_in_8bit"):
            raise self.refusal(
                "load_in_8bit (LLM.int8() multiplies by quantized activations)",
                "load_in_4bit, which quantizes weights only",
                f"quantize the original model again with load_in_4bit, or {USE_VLLM}",
            )
        if not self._is_set("load_in_4bit"):
            raise self.refusal("neither load_in_4bit nor load_in_8bit", "load_in_4bit true")
        self.excluded = self.check_names("llm_int8_skip_modules")

    def claims(self, module: str) -> bool:
        # The tensors say what is quantized; the config only what else was meant to be
        if module in self.packed:
            return True
        return self.block_of(module) in self.quantized_blocks and not self.excludes(module)

    def lists(self, module: str) -> bool:
        # Names match as transformers has matched them at one time or another
        return any(
            f"{name}." in f"{module}." or module.endswith(name) or module.startswith(name)
            for name in self.excluded
        )

    def scheme(self, module: str) -> Scheme:
        stored = self.checkpoint.modules()[module]
        name = next((name for name in STATES if name in stored), None)
        raw = self.checkpoint.metadata.get(f"{module}.{name}")
        if name is None or raw is None:
            raise PreflightError.single(
                module,
                f"no readable {' or '.join(STATES)} (only {', '.join(sorted(stored))})",
                f"one of at most {MAX_METADATA_BYTES} bytes",
                REDO,
            )
        try:
            state = parse_state(raw, STATES[name])
        except BadState as error:
            raise PreflightError.single(
                module, f"{error.found} in {name}", error.supported, REDO
            ) from error
        blocks = -(-state.n * state.k // state.blocksize)
        nested = NESTED_ABSMAX in stored or NESTED_MAP in stored
        if nested != (state.nested_blocksize is not None):
            tensors = f"{'' if nested else 'no '}tensors of double quantization"
            raise PreflightError.single(
                module,
                f"{tensors}, of which {name} says otherwise",
                f"tensors and {name} that agree",
                REDO,
            )
        absmax_dtypes = (DType.UINT8,) if nested else SCALE_DTYPES
        absmax = _vector(ABSMAX, blocks, *absmax_dtypes)
        if state.k % state.blocksize == 0 and ABSMAX in stored:
            # Every row begins with a block; elsewhere a rank keeps all blocks while it loads
            found = DTYPES.get(stored[ABSMAX].dtype, absmax.dtype)
            absmax = TensorLayout(ABSMAX, (Dim("n"), Dim("g")), absmax_dtypes, flat=found)
        layouts = [
            TensorLayout(WEIGHT, (Dim("n"), Dim("k", 2)), STORAGE_DTYPES, flat=DType.UINT8),
            absmax,
            _vector(QUANT_MAP, len(STATES[name].codebook), DType.FLOAT32),
            _vector(name, len(raw), DType.UINT8),
        ]
        if state.nested_blocksize is not None:
            layouts += [
                _vector(NESTED_ABSMAX, -(-blocks // state.nested_blocksize), DType.FLOAT32),
                _vector(NESTED_MAP, NESTED_MAP_SIZE, DType.FLOAT32),
            ]
        return Scheme(
            BitsAndBytesPacking(bits=STATES[name].bits, name=STATES[name].value),
            STATES[name],
            # The largest run of in_features that no block's border cuts in any row
            math.gcd(state.k, state.blocksize),
            tuple(layouts),
            scales=ABSMAX,
            sizes=(state.n, state.k),
            scale_dtype=DType.FLOAT32,
        )

    def _is_set(self, key: str) -> bool:
        found = self.config.get(key, False)
        if not isinstance(found, bool):
            raise self.refusal(f"{key} {found!r:.80}", f"{key} true or false")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesPacking(Packing):
    """Named after the codebook."""

    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, QUANT_MAP)
        state = _check_loaded_state(tensors, layer)
        largest = _check_codebook(tensors[QUANT_MAP], layer)
        codes = unpack_columns(tensors[WEIGHT], high_first=True)
        absmax = _absmax(tensors, layer, region, state)
        check_finite(absmax, layer.module, ABSMAX)
        phase = region.k_start % layer.spec.group_size
        codes = take(codes, 1, region.k_start, region.k, block=2)
        return LogicalWeight(codes, absmax / largest, None, layer.spec, phase)


class QuantState(NamedTuple):
    """What the JSON of a quantized module says; `nested_blocksize` None: no double quantization."""

    n: int
    k: int
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float


class BadState(ValueError):
    """A state that cannot be used; carries what was found and what is supported."""

    def __init__(self, found: str, supported: str) -> None:
        super().__init__(f"found {found}; supported: {supported}")
        self.found = found
        self.supported = supported


def parse_state(raw: bytes, weight_type: WeightType) -> QuantState:
    """Read and check the JSON of a module that says that it is of `weight_type`.

    Raises:
        BadState: it is no JSON object, or an entry cannot be right or is not supported.
    """
    try:
        state = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadState(f"{raw!r:.60}", "a JSON object") from error
    if not isinstance(state, dict):
        raise BadState(f"{state!r:.60}", "a JSON object")
    shape = _entry(state, "shape", "[N, K] with an even K", _is_shape)
    blocksize = _entry(state, "blocksize", f"one of {BLOCK_SIZES}", _is_blocksize)
    _entry(state, "quant_type", weight_type.value, lambda value: value == weight_type.value)
    if "nested_blocksize" not in state:
        return QuantState(*shape, blocksize, None, 0.0)
    nested = _entry(state, "nested_blocksize", "a positive integer", _is_size)
    _entry(state, "nested_dtype", "float32", lambda value: value == "float32")
    offset = _entry(state, "nested_offset", "a finite number", _is_finite)
    return QuantState(*shape, blocksize, nested, offset)


def _entry(state: Mapping[str, Any], key: str, supported: str, is_right: Any) -> Any:
    value = state.get(key)
    if not is_right(value):
        raise BadState(f"{key} {value!r:.60}", supported)
    return value


def _is_size(value: object) -> bool:
    # Products of two sizes stay below 2**63
    return type(value) is int and 0 < value < 1 << 31


def _is_blocksize(value: object) -> bool:
    return type(value) is int and value in BLOCK_SIZES


def _is_shape(value: object) -> bool:
    right = isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))
    return right and value[1] % 2 == 0


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _vector(name: str, size: int, *dtypes: DType) -> TensorLayout:
    return TensorLayout(name, (Dim(None, size=size),), dtypes)


def _check_loaded_state(tensors: Mapping[str, torch.Tensor], layer: LayerFormat) -> QuantState:
    """The state once more, from the tensor that was loaded beside the codes."""
    name = next(name for name in STATES if name in tensors)
    try:
        state = parse_state(bytes(tensors[name].tolist()), STATES[name])
    except BadState as error:
        raise WeightLoadError(f"{layer.module}.{name}: {error}; {REDO}") from error
    if (state.n, state.k) != (layer.n, layer.k):
        raise WeightLoadError(
            f"{layer.module}.{name}: found shape {[state.n, state.k]}, expected "
            f"{[layer.n, layer.k]} as before loading; the file changed while loading"
        )
    return state


def _check_codebook(quant_map: torch.Tensor, layer: LayerFormat) -> float:
    """The largest entry of the type's own codebook, which bitsandbytes divides by."""
    # vLLM's weight transfer loads with the GPU as the default device
    codebook = torch.tensor(layer.spec.weight_type.codebook, dtype=torch.float32, device="cpu")
    largest = float(codebook.max())
    if not torch.equal(quant_map.cpu(), codebook / largest):
        raise WeightLoadError(
            f"{layer.module}.{QUANT_MAP}: found {[round(v, 4) for v in quant_map.tolist()]}, "
            f"expected the codebook of {layer.spec.weight_type.value} in bitsandbytes; quantize "
            "the model again with bitsandbytes"
        )
    return largest


def _absmax(
    tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region, state: QuantState
) -> torch.Tensor:
    """The absmax of each group of a region, fp32 `[n, G]`, rounded as bitsandbytes rounds it."""
    stored = tensors[ABSMAX]
    rows = torch.arange(region.n_start, region.n_stop, device=stored.device)
    groups = torch.arange(*region.groups(layer.spec.group_size), device=stored.device)
    first_weight = rows[:, None] * layer.k + groups * layer.spec.group_size
    blocks = first_weight // state.blocksize
    if stored.ndim == 1:
        stored = stored[blocks]
    if state.nested_blocksize is None:
        return stored.float()
    levels = tensors[NESTED_MAP][stored.int()]
    scales = tensors[NESTED_ABSMAX][blocks // state.nested_blocksize]
    offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=stored.device)
    return levels * scales + offset
