"""Stacks of all experts of a layer, handed to vLLM's models expert by expert.

Every model of vLLM's has code for experts that are stored one by one, few for stacks, and that for
plain numbers. vLLM applies the mapper of names to all tensors of a file before a model sees one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.load.stored import piece_of


class StackMapper(WeightsMapper):
    """Takes stacks apart, by `pieces`: what each of them holds, by its name in the file."""

    pieces: Mapping[str, Sequence[TensorInfo]] = MappingProxyType({})

    @classmethod
    def of(cls, mapper: WeightsMapper, pieces: Mapping[str, Sequence[TensorInfo]]) -> "StackMapper":
        """A mapper that does what `mapper` does, to the pieces of stacks."""
        self = cls(**_names(mapper))
        self.pieces = pieces
        return self

    def __or__(self, other: WeightsMapper) -> "StackMapper":
        return self.of(super().__or__(other), self.pieces)

    def __ror__(self, other: WeightsMapper) -> "StackMapper":
        return self.of(other | WeightsMapper(**_names(self)), self.pieces)

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, Any]]:
        return super().apply(self._apart(weights))

    def _apart(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if (pieces := self.pieces.get(name)) is None:
                yield name, tensor
                continue
            for info in pieces:
                assert info.piece is not None
                yield info.name, piece_of(tensor, info.piece)


def _names(mapper: WeightsMapper) -> dict[str, Any]:
    """What a mapper does to names."""
    return {each.name: getattr(mapper, each.name) for each in fields(mapper)}
