"""Tensors that hold all experts of a layer at once, told apart: one entry for each expert's matrix.

transformers keeps experts as `experts.gate_up_proj` `[experts, 2 N, K]`, gates first, and
`experts.down_proj` `[experts, N, K]`. Tools that quantize them keep both dimensions in whatever
they store, and name it after the module (`gate_up_proj.weight_packed`) or after the parameter
(`gate_up_proj_packed`). Rows of an expert lie side by side in the file, so each entry is a piece of
it, under the name that a tensor of this expert alone would have. Sources: `repack_moe` of
llm-compressor, `pack_to_int32` of compressed-tensors, `FP8Experts` of transformers.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from vllm_fusedq.checkpoint.safetensors_header import DTYPE_BITS, PLAIN_DTYPES, Piece, TensorInfo
from vllm_fusedq.names import EXPERT_PARTS

FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
"""What is stored in one, the first half of its rows first."""
# A damaged header may speak of any number
MOST_EXPERTS = 1 << 14
WEIGHT, BIAS = "weight", "bias"
# What is named after the parameter of a weight, and is not of the weight
_BESIDE = (BIAS, "activation_scale", "input_scale")
_PARTS = "|".join((*FUSED_PARTS, *EXPERT_PARTS))
_STACKED = re.compile(rf"((?:.+\.)?experts)\.({_PARTS})([._].+|)")

_Stack = dict[tuple[str, str], TensorInfo]
"""The tensors of a layer's experts by part and suffix."""


def told_apart(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, those of quantized stacks as pieces, in the same order.

    Stacks of plain numbers stay as they are, and those whose tensors do not fit each other, or that
    hold experts which are stored one by one too.
    """
    pieces: dict[str, list[TensorInfo]] = {}
    for experts, stack in quantized_stacks(tensors).items():
        found = {
            info.name: list(_pieces(experts, part, suffix, info))
            for (part, suffix), info in (stack.items() if _fits(stack) else ())
        }
        if not any(piece.name in tensors for each in found.values() for piece in each):
            pieces |= found
    return {
        piece.name: piece for name, info in tensors.items() for piece in pieces.get(name, (info,))
    }


def pieces_of(tensors: Mapping[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """The pieces among `tensors` by the name of what the file holds."""
    found: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in tensors.values():
        if info.piece is not None:
            found[info.piece.tensor].append(info)
    return found


def quantized_stacks(tensors: Mapping[str, TensorInfo]) -> dict[str, _Stack]:
    """The stacks of all experts of a layer that hold more than plain numbers, by their name."""
    stacks: dict[str, _Stack] = defaultdict(dict)
    for name, info in tensors.items():
        if match := _STACKED.fullmatch(name):
            stacks[match[1]][match[2], _suffix(match[3])] = info
    return {
        experts: stack
        for experts, stack in stacks.items()
        if any(
            suffix != BIAS and (suffix != WEIGHT or info.dtype not in PLAIN_DTYPES)
            for (_, suffix), info in stack.items()
        )
    }


def _suffix(rest: str) -> str:
    """The suffix that a module's tensor has, of what follows the name of a part."""
    if rest.startswith("."):
        return rest[1:]
    return rest[1:] if rest[1:] in _BESIDE else WEIGHT + rest


def _fits(stack: _Stack) -> bool:
    """Whether all tensors are of as many experts, and none cuts a row of both halves in two."""
    first, *others = {info.shape[:1] for info in stack.values()}
    if others or not first or not 0 < first[0] <= MOST_EXPERTS:
        return False
    halves = (info.shape[1] for (part, _), info in stack.items() if _is_halved(part, info))
    return all(size % 2 == 0 for size in halves)


def _is_halved(part: str, info: TensorInfo) -> bool:
    """Both parts share what is one number of an expert."""
    return part in FUSED_PARTS and len(info.shape) > 1 and info.shape[1] != 1


def _pieces(experts: str, part: str, suffix: str, info: TensorInfo) -> Iterator[TensorInfo]:
    names = FUSED_PARTS.get(part, (part,))
    shape = info.shape[1:]
    if _is_halved(part, info):
        shape = (shape[0] // 2, *shape[1:])
    for index in range(info.shape[0]):
        for half, name in enumerate(names):
            start = half * shape[0] if _is_halved(part, info) else 0
            piece = Piece(info.name, index, (start, start + shape[0]) if shape else None)
            rows = (index * prod(info.shape[1:])) + start * prod(shape[1:])
            yield replace(
                info,
                name=f"{experts}.{index}.{name}.{suffix}",
                shape=shape,
                start=info.start + rows * DTYPE_BITS[info.dtype] // 8,
                piece=piece,
            )
