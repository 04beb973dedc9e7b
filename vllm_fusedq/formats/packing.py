"""What a packing knows: how the values of a quantized linear lie in its stored tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fusedq_kernels.types import LogicalWeight, PackedWeight
    from vllm_fusedq.formats.layer import LayerFormat, Region
    from vllm_fusedq.formats.shared.findings import Finding


@dataclass(frozen=True, slots=True)
class Placed:
    """Rows that were copied as they lie; `perm` int32 `[K]` is their activation order, if any."""

    perm: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing(ABC):
    """One packing of one format, which every reader of configs may hand out. Picklable.

    `bits` of a stored code may be fewer than those of the weight type (`shared/widening.py`).
    `ordered`: which group an in_feature belongs to is stored (activation reordering), so its rows
    are sorted at load (`shared/ordering.py`). `name` tells the packings of a format apart, in
    words; the plain one has none.

    All methods take tensors as `stored_slices` cuts them, by their suffixes, on any device.
    """

    bits: int
    ordered: bool = False
    name: str = ""

    @abstractmethod
    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        """The logical weight of `region`.

        Returns codes uint8 `[region.n, region.k]`, scales `[region.n, G]` in the stored dtype and
        zeros uint8 `[region.n, G]` or None, on the tensors' device, where G counts the groups that
        the region touches; `phase` is `region.k_start % group_size`. An ordered layer is sorted
        as `ordering.sort_rows` says.

        Raises:
            WeightLoadError: a tensor is missing, does not fit or holds values that cannot be right.
        """

    def evidence(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> Finding | None:
        """Which of two conventions the stored values prove, where a config may name the wrong one.

        Asked once per layer. None where the packing has one convention only.

        Raises:
            WeightLoadError: as `logical` does, or the values contradict the config.
        """
        return None

    def place(
        self,
        tensors: Mapping[str, torch.Tensor],
        layer: LayerFormat,
        region: Region,
        packed: PackedWeight,
        start: int,
    ) -> Placed | None:
        """Where the region's tensors are rows of `packed` as they lie, copy them from `start` on.

        None where they are not; then `packed` is left alone.

        Raises:
            WeightLoadError: as `logical` does.
        """
        return None
