"""The experts of one layer: each packed into its slice of the stack once its tensors are there."""

from dataclasses import dataclass

import torch

from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.stacked import empty_stacked
from fusedq_kernels.types import PackedWeight, StackedWeight
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats import Finding
from vllm_fusedq.load.loader import LayerLoader, never_loaded
from vllm_fusedq.load.provenance import StoredTensors
from vllm_fusedq.plan.folding import fold_names
from vllm_fusedq.plan.layer import LayerPlan


@dataclass(slots=True)
class ExpertsLoader:
    """Fills one `StackedWeight` from the checkpoint tensors of a rank's experts, in any order.

    What a `LayerLoader` does for a layer, each of `loaders` does for an expert, in a view.
    """

    plan: LayerPlan
    packed: StackedWeight
    loaders: tuple[LayerLoader, ...]
    _places: dict[int, int]

    @classmethod
    def create(
        cls,
        plan: LayerPlan,
        act_dtype: DType | torch.dtype,
        device: torch.device,
        source: StoredTensors | None = None,
    ) -> "ExpertsLoader":
        """Allocate the resident tensors of `plan` on `device`."""
        assert plan.experts is not None
        packed = empty_stacked(
            *(plan.layout, len(plan.experts), plan.n, plan.rows, plan.spec, plan.phase),
            *(act_dtype, device, plan.k, plan.ordered),
        )
        loaders = tuple(
            LayerLoader(plan.of_expert(place), packed.expert(place), source)
            for place in range(packed.count)
        )
        return cls(plan, packed, loaders, {e: place for place, e in enumerate(plan.experts)})

    @property
    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        """Every tensor suffix that an expert reads, with its stored dtype."""
        return self.loaders[0].tensor_dtypes

    @property
    def sample(self) -> PackedWeight:
        """One expert's weight, by which all launches are known."""
        return self.packed.expert(0)

    @property
    def stored_bytes(self) -> int:
        return sum(loader.stored_bytes for loader in self.loaders)

    @property
    def pack_seconds(self) -> float:
        return sum(loader.pack_seconds for loader in self.loaders)

    @property
    def findings(self) -> dict[str, Finding]:
        return {name: one for each in self.loaders for name, one in each.findings.items()}

    def add(self, name: str, tensor: torch.Tensor, shard_id: object, expert: int) -> bool:
        """Take one whole checkpoint tensor of part `shard_id` of an expert, by its number.

        Returns:
            Whether the expert is this rank's.

        Raises:
            WeightLoadError: as `LayerLoader.add` does.
        """
        place = self._places.get(expert)
        if place is None:
            return False
        self.loaders[place].add(name, tensor, shard_id)
        return True

    def missing(self) -> list[str]:
        """Full names of the tensors that have not arrived; empty once all experts are packed."""
        return [name for loader in self.loaders for name in loader.missing()]

    def check_complete(self) -> None:
        """Raise WeightLoadError unless every tensor arrived and every expert is packed."""
        if missing := self.missing():
            raise WeightLoadError(never_loaded(self.plan.name, len(missing), fold_names(missing)))
