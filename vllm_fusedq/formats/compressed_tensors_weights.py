"""The weights sections of compressed-tensors' config_groups: packing and group size of each.

Source: `QuantizationArgs` and the compressors of the compressed_tensors package.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.compressed_tensors_packing import (
    SCALE,
    BytePacking,
    CompressedTensorsPacking,
    WordPacking,
)
from vllm_fusedq.formats.float4_packing import (
    MXFP4,
    MXFP4_GROUP,
    NVFP4,
    NVFP4_GROUP,
    Float4Packing,
)
from vllm_fusedq.formats.float8_packing import (
    BLOCKS,
    MXFP8_GROUP,
    Float8Packing,
    ScaleOf,
    is_block,
)

AnyPacking: TypeAlias = CompressedTensorsPacking | Float4Packing | Float8Packing

BITS = range(2, 9)
WORDS, BYTES = "pack-quantized", ("int-quantized", "naive-quantized")
FLOAT = "float-quantized"
# What a group of them has to be: its strategy and size
FLOATS_IN_GROUPS: dict[str, tuple[Float4Packing | Float8Packing, str, int]] = {
    "nvfp4-pack-quantized": (NVFP4, "tensor_group", NVFP4_GROUP),
    "mxfp4-pack-quantized": (MXFP4, "group", MXFP4_GROUP),
    "mxfp8-quantized": (
        Float8Packing(name="mxfp8", scale=SCALE.name, scale_of=ScaleOf.BLOCK, exponents=True),
        *("group", MXFP8_GROUP),
    ),
}
PACKINGS = (WORDS, *BYTES, FLOAT, *FLOATS_IN_GROUPS)
# Of weights only, the package calls floats naive-quantized
FLOAT_PACKINGS = (FLOAT, "naive-quantized")
FLOAT_BITS = 8
KNOWN_WEIGHTS = (
    f"{BITS[0]}- to {BITS[-1]}-bit int weights, pack-quantized or int-quantized, and "
    f"{FLOAT_BITS}-bit float ones, {FLOAT}"
)
FLOAT_STRATEGIES = ("tensor", "channel", "group", "block")
# 3-, 5-, 6- and 7-bit codes straddle words from this version of the package on
FIRST_STREAMING_VERSION = (0, 18)
# Both only change how the quantizer calibrates, not what it stores
HARMLESS_ORDERS = (None, False, "static", "weight")
STORED_ORDERS = ("group", "dynamic")


def read_weights(
    fmt: CheckpointFormat, name: str, weights: dict[str, Any], stored_as: str
) -> tuple[AnyPacking, bool, int]:
    """Packing, whether it is symmetric, and group size of the weights section of group `name`.

    Raises:
        UnsupportedCheckpoint: naming the group and what of it is not read.
    """
    if stored_as in FLOATS_IN_GROUPS:
        return _read_floats_in_groups(fmt, name, weights, stored_as)
    if weights.get("type") == "float" and stored_as in FLOAT_PACKINGS:
        return _read_floats(fmt, name, weights)
    bits = weights.get("num_bits")
    known_bits = type(bits) is int and bits in BITS
    if not known_bits or weights.get("type", "int") != "int" or stored_as == FLOAT:
        found = f"{bits!r:.80}-bit {weights.get('type')} weights in {name}, {stored_as}"
        raise fmt.refusal(found, KNOWN_WEIGHTS)
    if weights.get("dynamic"):
        raise fmt.refusal(f"dynamic weights in {name}", "static weights")
    order = weights.get("actorder")
    if order not in (*HARMLESS_ORDERS, *STORED_ORDERS):
        known = "actorder null, static, weight, group or dynamic"
        raise fmt.refusal(f"actorder {order!r:.80} in {name}", known)
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise fmt.refusal(f"symmetric {symmetric!r:.80} in {name}", "symmetric true or false")
    group_size = _group_size(fmt, name, weights)
    ordered = order in STORED_ORDERS and group_size != -1
    if stored_as in BYTES:
        packing = BytePacking(bits=bits, ordered=ordered, name=stored_as)
    else:
        packing = _word_packing(fmt, bits, ordered, name)
    return packing, symmetric, group_size


def _read_floats(
    fmt: CheckpointFormat, name: str, weights: dict[str, Any]
) -> tuple[Float8Packing, bool, int]:
    """`read_weights` of floats."""
    expected = {"num_bits": (FLOAT_BITS,), "symmetric": (True, None), "dynamic": (False, None)}
    expected["actorder"] = HARMLESS_ORDERS
    for key, known in expected.items():
        if weights.get(key) not in known:
            raise fmt.refusal(
                f"float weights with {key} {weights.get(key)!r:.80} in {name}",
                f"{FLOAT_BITS}-bit float weights, static, symmetric and without reordering",
            )
    strategy, group_size, rows = weights.get("strategy"), -1, 1
    if strategy == "group":
        group_size = fmt.check_group_size(weights.get("group_size"))
    elif strategy == "block":
        block = weights.get("block_structure")
        if not is_block(block):
            raise fmt.refusal(f"block_structure {block!r:.80} in {name}", BLOCKS)
        rows, group_size = block
    elif strategy not in FLOAT_STRATEGIES:
        known = ", ".join(FLOAT_STRATEGIES)
        raise fmt.refusal(f"strategy {strategy!r:.80} of float weights in {name}", known)
    scale_of = ScaleOf.CHANNEL if group_size == -1 else ScaleOf.BLOCK
    if strategy == "tensor":
        scale_of = ScaleOf.TENSOR
    packing = Float8Packing(name=FLOAT, scale=SCALE.name, scale_of=scale_of, rows=rows)
    return packing, True, group_size


def _read_floats_in_groups(
    fmt: CheckpointFormat, name: str, weights: dict[str, Any], stored_as: str
) -> tuple[Float4Packing | Float8Packing, bool, int]:
    """`read_weights` of NVFP4, MXFP4 and MXFP8."""
    packing, strategy, group_size = FLOATS_IN_GROUPS[stored_as]
    expected = {"num_bits": packing.bits, "type": "float"}
    expected |= {"strategy": strategy, "group_size": group_size}
    found = {key: weights.get(key) for key in expected}
    order = weights.get("actorder")
    # The package stores no order of such weights, whatever the config says of one
    if order not in HARMLESS_ORDERS:
        raise fmt.refusal(
            f"{stored_as} with actorder {order!r:.80} in {name}",
            "actorder null, static or weight",
        )
    if found != expected or weights.get("dynamic") or weights.get("symmetric", True) is not True:
        raise fmt.refusal(
            f"format {stored_as} with {found} in {name}",
            f"static symmetric weights, {expected}",
        )
    return packing, True, group_size


def _word_packing(fmt: CheckpointFormat, bits: int, ordered: bool, name: str) -> WordPacking:
    if 32 % bits == 0 or _streams(fmt, bits, name):
        return WordPacking(bits=bits, ordered=ordered)
    return WordPacking(bits=bits, ordered=ordered, name=f"{WORDS}, padded", streaming=False)


def _streams(fmt: CheckpointFormat, bits: int, name: str) -> bool:
    """Whether codes straddle words, by the version of the package that packed them."""
    version = fmt.config.get("version")
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None:
        raise fmt.refusal(
            f"{bits}-bit weights in {name} and version {version!r:.80} of compressed-tensors",
            "a version in the config, because their packing changed with version 0.18",
            "add the version of compressed-tensors that packed the model",
        )
    return tuple(int(part) for part in match.groups()) >= FIRST_STREAMING_VERSION


def _group_size(fmt: CheckpointFormat, name: str, weights: dict[str, Any]) -> int:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy == "group" or (strategy is None and group_size not in (None, -1)):
        return fmt.check_group_size(group_size)
    if strategy == "channel" or (strategy is None and group_size == -1):
        return -1
    raise fmt.refusal(f"strategy {strategy!r} in {name}", "strategy group or channel")
