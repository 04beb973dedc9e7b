"""From checkpoint tensors to the resident weight of one layer: collect, check, unpack, pack.

Tensors arrive whole and in any order. Only the rank's slice is kept; the moment the last one is
there, the layer is repacked in stripes of rows and the slices are dropped, so loading
holds the packed model plus the layers in flight.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import LogicalWeight, PackedWeight, StackedWeight
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats import Finding
from vllm_fusedq.formats.layer import LayerFormat, Region, TensorLayout, stored_slices
from vllm_fusedq.load.provenance import StoredTensors
from vllm_fusedq.load.rows import alternated, padded, stack
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.shards import PartShard

# Bounds what packing a small layer needs beyond its own bytes
MIN_STRIPES = 8


@dataclass(slots=True)
class LayerLoader:
    """Fills one layer's `PackedWeight` from the checkpoint tensors of its parts.

    `source`, where given, is what the first load's tensors are compared with. `stored_bytes` counts
    what the rank took from the checkpoint, `pack_seconds` the time that repacking took.
    """

    plan: LayerPlan
    packed: PackedWeight
    source: StoredTensors | None = None
    stored_bytes: int = 0
    pack_seconds: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)
    """By module: which convention its values prove (filled as the layer is packed)."""
    _slices: dict[tuple[PartShard, str], torch.Tensor] = field(default_factory=dict)
    _packed_once: bool = False

    @classmethod
    def create(
        cls,
        plan: LayerPlan,
        act_dtype: DType | torch.dtype,
        device: torch.device,
        source: StoredTensors | None = None,
    ) -> "LayerLoader":
        """Allocate the resident tensors of `plan` on `device`."""
        packed = packing.empty_packed(
            plan.layout,
            plan.n,
            plan.rows,
            plan.spec,
            plan.phase,
            act_dtype,
            device,
            in_features=plan.k,
            ordered=plan.ordered,
        )
        return cls(plan, packed, source)

    @property
    def resident(self) -> dict[str, torch.Tensor | None]:
        """What the operator reads, by the names of its arguments."""
        return resident_tensors(self.packed)

    @property
    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        """Every tensor suffix that any part of this layer reads, with its stored dtype."""
        return {t.name: t.dtype.torch for fmt in self.plan.formats for t in fmt.tensors}

    def add(self, name: str, tensor: torch.Tensor, shard_id: object = None) -> None:
        """Take one whole checkpoint tensor of the part `shard_id` (None: of the only part).

        Raises:
            WeightLoadError: no such part or tensor, a shape or dtype other than the header said,
                or (with the last tensor) values that cannot be right.
        """
        for part, fmt in self._parts_for(shard_id):
            stored = _find_tensor(fmt, name, part)
            _check_stored(stored, fmt, part, tensor)
            grid = fmt.grid(stored, tensor)
            cut = grid[stored_slices(stored, part.region, fmt.spec.group_size)]
            # A copy even on the CPU: the loader's tensor is a view of the whole mapped file.
            self._slices[part, name] = torch.empty_like(
                cut, device=self.packed.qweight.device, memory_format=torch.contiguous_format
            ).copy_(cut)
            self.stored_bytes += cut.nbytes
        if self.source is not None and not self._packed_once:
            # After the copy, which has read the pages of the file
            for module in dict.fromkeys(part.module for part, _ in self._parts_for(shard_id)):
                self.source.check(f"{module}.{name}", tensor)
        if not self.missing():
            start = time.perf_counter()
            self._pack()
            self.pack_seconds += time.perf_counter() - start

    def missing(self) -> list[str]:
        """Full names of the tensors that have not arrived; empty once the layer is packed."""
        if self._packed_once and not self._slices:
            return []
        missing = [
            f"{part.module}.{stored.name}"
            for part, fmt in self._all_parts()
            for stored in fmt.tensors
            if (part, stored.name) not in self._slices
        ]
        # Several ranges of a module's rows miss the same tensor
        return list(dict.fromkeys(missing))

    def check_complete(self) -> None:
        """Raise WeightLoadError unless every tensor arrived and the layer is packed."""
        if missing := self.missing():
            raise WeightLoadError(never_loaded(self.plan.name, len(missing), missing))

    def _all_parts(self) -> Iterator[tuple[PartShard, LayerFormat]]:
        return zip(self.plan.shard.parts, self.plan.formats, strict=True)

    def _parts_for(self, shard_id: object) -> list[tuple[PartShard, LayerFormat]]:
        parts = list(self._all_parts())
        if shard_id is None:
            # One module on disk may hold all parts of a fused layer (Phi-3's qkv_proj).
            if len({part.module for part, _ in parts}) == 1:
                return parts
        else:
            wanted = shard_id if isinstance(shard_id, tuple) else (shard_id,)
            chosen = [(part, fmt) for part, fmt in parts if part.shard_id in wanted]
            if chosen:
                return chosen
        known = ", ".join(f"{part.shard_id!r} ({part.module})" for part, _ in parts)
        raise WeightLoadError(
            f"{self.plan.name}: vLLM loads part {shard_id!r}, but the plan knows {known}"
        )

    def _pack(self) -> None:
        if not self._place():
            self._repack()
        self._slices.clear()
        self._packed_once = True

    def _place(self) -> bool:
        """Copy tensors that are stored as they stay resident; False if they are not."""
        if self.plan.shard.alternating:
            return False
        start = 0
        for part, fmt in self._all_parts():
            if not part.region.n:
                continue
            slices = self._slices_of(part, fmt)
            placed = fmt.packing.place(slices, fmt, part.region, self.packed, start)
            if placed is None:
                return False
            if placed.perm is not None:
                self._keep_order(part, placed.perm)
            start += part.region.n
        return True

    def _repack(self) -> None:
        self._weigh_evidence()
        held, plan = self.plan.shard.held, self.plan
        device, at_most = self.packed.qweight.device, plan.n // MIN_STRIPES
        for start, stop in packing.stripes(held, plan.rows, device, at_most):
            weight = self._rows(start, stop)
            if stop == held:
                # Rows of padding beyond the last stripe stay as allocated, worth zero
                weight = padded(weight, min(-held % packing.ROW_ALIGNMENT, plan.n - held))
            packing.pack_rows(self.packed, start, weight)

    def _weigh_evidence(self) -> None:
        for part, fmt in self._all_parts():
            if not part.region.n:
                continue
            slices = self._slices_of(part, fmt)
            if finding := fmt.packing.evidence(slices, fmt, part.region):
                self.findings[part.module] = finding

    def _slices_of(self, part: PartShard, fmt: LayerFormat) -> dict[str, torch.Tensor]:
        return {stored.name: self._slices[part, stored.name] for stored in fmt.tensors}

    def _rows(self, start: int, stop: int) -> LogicalWeight:
        """Rows `[start, stop)` of the fused layer, as they lie in the resident weight."""
        if not self.plan.shard.alternating:
            return stack([self._logical(*piece) for piece in self._pieces(start, stop)])
        halves = [
            self._logical(part, fmt, rows_of(part.region, start // 2, stop // 2))
            for part, fmt in self._all_parts()
        ]
        return alternated(*halves)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[PartShard, LayerFormat, Region]]:
        """The parts' regions that make up rows `[start, stop)` of the fused layer."""
        offset = 0
        for part, fmt in self._all_parts():
            region = part.region
            first, last = max(start - offset, 0), min(stop - offset, region.n)
            if first < last:
                yield part, fmt, rows_of(region, first, last)
            offset += region.n

    def _logical(self, part: PartShard, fmt: LayerFormat, region: Region) -> LogicalWeight:
        tensors = {}
        for stored in fmt.tensors:
            held = stored_slices(stored, part.region, fmt.spec.group_size)
            wanted = stored_slices(stored, region, fmt.spec.group_size)
            relative = tuple(
                slice(w.start - h.start, w.stop - h.start)
                for w, h in zip(wanted, held, strict=True)
            )
            tensors[stored.name] = self._slices[part, stored.name][relative]
        weight = fmt.packing.logical(tensors, fmt, region)
        if weight.perm is not None:
            self._keep_order(part, weight.perm)
        return weight

    def _keep_order(self, part: PartShard, perm: torch.Tensor) -> None:
        """One gather of the activation serves all parts of a fused layer."""
        first = self.plan.shard.parts[0]
        if part == first:
            self.packed.perm.copy_(perm)
        elif not torch.equal(perm.to(self.packed.perm.device), self.packed.perm):
            raise WeightLoadError(
                f"{self.plan.name}: found another activation order in {part.module} than in "
                f"{first.module}, which vLLM fuses into one layer with one activation; supported: "
                "one order for all parts of a fused layer; quantize again with desc_act "
                "false"
            )


def resident_tensors(packed: PackedWeight | StackedWeight) -> dict[str, torch.Tensor | None]:
    names = ("qweight", "scales", "zeros", "perm")
    return {name: getattr(packed, name) for name in names}


def rows_of(region: Region, start: int, stop: int) -> Region:
    """Rows `[start, stop)` of a region, counted from its own first."""
    return replace(region, n_start=region.n_start + start, n_stop=region.n_start + stop)


def never_loaded(layer: str, count: int, names: Sequence[str]) -> str:
    """What to say of a layer of which `count` tensors did not arrive."""
    return (
        f"{layer}: {count} tensors were never loaded ({', '.join(names)}); the checkpoint files "
        "are incomplete, its names do not match the model, or --load-format dummy reads none; "
        "download the checkpoint again, or leave --load-format at auto"
    )


def _find_tensor(fmt: LayerFormat, name: str, part: PartShard) -> TensorLayout:
    if stored := fmt.tensor(name):
        return stored
    raise WeightLoadError(
        f"{part.module}.{name}: unexpected tensor for {fmt.description}; supported: "
        f"{', '.join(stored.name for stored in fmt.tensors)}"
    )


def _check_stored(
    stored: TensorLayout, fmt: LayerFormat, part: PartShard, tensor: torch.Tensor
) -> None:
    shape, dtype = tuple(tensor.shape), stored.dtype.torch
    if tensor.dtype != dtype or not fmt.fits(stored, shape, stored.dtype):
        raise WeightLoadError(
            f"{part.module}.{stored.name}: loaded as {tensor.dtype} {list(shape)}; the header said "
            f"{dtype} {list(fmt.stored_shape(stored))}: vLLM's code for this model rearranges the "
            "tensor while loading, or the file was replaced meanwhile; serve this model without "
            "--quantization fusedq, or download the checkpoint again"
        )
