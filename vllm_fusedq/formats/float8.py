"""What the methods of 8-bit floats have in common: a weight's dtype says that it is quantized."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.float8_packing import WEIGHT, Float8Packing
from vllm_fusedq.formats.headers import unread
from vllm_fusedq.formats.layer import Scheme

# What the dtypes of 8-bit floats begin with in a header: no other weight is one
FLOAT8 = "F8_"


class Float8Format(CheckpointFormat):
    """Its config need not list what stays as it is, and tools and models match the lists otherwise.

    A subclass names the scales (`markers`) and says what has one.
    """

    of_activations: ClassVar[tuple[str, ...]]
    """Tensors that say how to quantize activations, where that is not found as they come."""

    @property
    def tensor_names(self) -> frozenset[str]:
        return self.markers | set(self.of_activations)

    @cached_property
    def packed(self) -> dict[str, list[str]]:
        # Without its scales too
        floats = {
            module: [WEIGHT.name]
            for module, stored in self.checkpoint.modules().items()
            if WEIGHT.name in stored and stored[WEIGHT.name].dtype.startswith(FLOAT8)
        }
        return floats | super().packed

    def claims(self, module: str) -> bool:
        return module in self.packed

    def claims_head(self, module: str) -> bool:
        return self.claims(module)

    def claims_embedding(self, module: str) -> bool:
        return self.claims(module)

    def scheme(self, module: str) -> Scheme:
        stored = self.checkpoint.modules()[module]
        packing, group_size = self.packing_of(stored)
        scheme = packing.scheme(stored, group_size)
        return replace(scheme, layouts=(*scheme.layouts, *unread(stored, self.of_activations)))

    @abstractmethod
    def packing_of(self, stored: Mapping[str, TensorInfo]) -> tuple[Float8Packing, int]:
        """Packing and group size of a module with these headers."""
