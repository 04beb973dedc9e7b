"""The experts of one layer: each packed into its slice of the stack once its tensors are there."""

from dataclasses import dataclass, field

import torch

from fusedq_kernels.call import ALTERNATION
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.stacked import empty_stacked
from fusedq_kernels.types import StackedWeight
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats import Finding
from vllm_fusedq.formats.layer import check_finite
from vllm_fusedq.load.loader import LayerLoader, never_loaded, resident_tensors
from vllm_fusedq.load.provenance import StoredTensors
from vllm_fusedq.plan.experts import BIAS
from vllm_fusedq.plan.folding import fold_names
from vllm_fusedq.plan.layer import LayerPlan


@dataclass(slots=True)
class ExpertsLoader:
    """Fills one `StackedWeight` from the checkpoint tensors of a rank's experts, in any order.

    What a `LayerLoader` does for a layer, each of `loaders` does for an expert, in a view. `bias`,
    if any, is `[experts, N]` in the activations' dtype, in the order of the rows.
    """

    plan: LayerPlan
    packed: StackedWeight
    bias: torch.Tensor | None
    loaders: tuple[LayerLoader, ...]
    source: StoredTensors | None
    _places: dict[int, int]
    _biased: set[str] = field(default_factory=set)

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
        bias = None
        if plan.shard.biased:
            dtype = plan.main.call.dtype.torch
            bias = torch.zeros((packed.count, plan.n), dtype=dtype, device=device)
        loaders = tuple(
            LayerLoader(plan.of_expert(place), packed.expert(place), source)
            for place in range(packed.count)
        )
        places = {number: place for place, number in enumerate(plan.experts)}
        return cls(plan, packed, bias, loaders, source, places)

    @property
    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        """Every tensor suffix that an expert reads, with its stored dtype."""
        biases = {} if self.bias is None else {BIAS: self.bias.dtype}
        return self.loaders[0].tensor_dtypes | biases

    @property
    def resident(self) -> dict[str, torch.Tensor | None]:
        """What the operator reads, by the names of its arguments."""
        return resident_tensors(self.packed) | {BIAS: self.bias}

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
        if name == BIAS and self.bias is not None:
            self._add_bias(tensor, shard_id, place)
        else:
            self.loaders[place].add(name, tensor, shard_id)
        return True

    def _add_bias(self, tensor: torch.Tensor, shard_id: object, place: int) -> None:
        shard, formats = self.loaders[place].plan.shard, self.loaders[place].plan.formats
        index = next(i for i, part in enumerate(shard.parts) if part.shard_id == shard_id)
        part, fmt = shard.parts[index], formats[index]
        name, region = f"{part.module}.{BIAS}", part.region
        if tuple(tensor.shape) != (fmt.n,):
            raise WeightLoadError(
                f"{name}: found a bias {list(tensor.shape)}, expected [{fmt.n}], the out_features "
                "of its weight; download the checkpoint again or quantize the model again"
            )
        check_finite(tensor, part.module, BIAS)
        if self.source is not None and name not in self._biased:
            self.source.check(name, tensor)
        self._biased.add(name)
        values = tensor[region.n_start : region.n_stop].to(self.bias)
        if region.k_start:
            # Ranks that share the in_features add up; the first one has the bias
            return
        rows = self.bias[place].view(-1, len(shard.parts), ALTERNATION)
        if shard.alternating:
            rows[:, index] = values.view(-1, ALTERNATION)
        else:
            self.bias[place] = values

    def missing(self) -> list[str]:
        """Full names of the tensors that have not arrived; empty once all experts are packed."""
        names = [name for loader in self.loaders for name in loader.missing()]
        if self.bias is not None:
            wanted = (f"{part.module}.{BIAS}" for part in self.plan.shard.parts)
            names += [name for name in wanted if name not in self._biased]
        return names

    def check_complete(self) -> None:
        """Raise WeightLoadError unless every tensor arrived and every expert is packed."""
        if missing := self.missing():
            raise WeightLoadError(never_loaded(self.plan.name, len(missing), fold_names(missing)))
