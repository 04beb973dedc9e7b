"""What one tensor-parallel rank holds of a layer: slices of N, slices of K, replicated heads.

Pure arithmetic on logical indices. `plan.py` turns the slices into kernels and parameters,
`formats/base.py` turns a `Region` into slices of stored tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from vllm_fusedq.formats.layer import Region


class ParallelStyle(Enum):
    """How vLLM splits a linear layer over ranks."""

    COLUMN = "column"
    ROW = "row"
    REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class PartShard:
    """One checkpoint module inside a vLLM layer, and the part of it that this rank holds.

    `shard_id` is what vLLM's loaders pass for the part ("q", "k", "v", 0, 1) or None where the
    vLLM layer and the checkpoint module are one.
    """

    module: str
    shard_id: str | int | None
    region: Region


@dataclass(frozen=True, slots=True)
class LayerShard:
    """One vLLM linear layer as a rank holds it: its parts stacked along N, one range of K.

    `padding` rows worth zero follow the parts: vLLM pads the vocabulary of an lm_head and of an
    embedding. Of an embedding rows are `gathered`; it is `multiplied` too where it is also the
    lm_head.
    """

    prefix: str
    style: ParallelStyle
    tp_size: int
    parts: tuple[PartShard, ...]
    padding: int = 0
    gathered: bool = False
    multiplied: bool = True

    @property
    def n(self) -> int:
        return self.held + self.padding

    @property
    def held(self) -> int:
        """Rows that come from the checkpoint; none at all where a rank holds padding only."""
        return sum(part.region.n for part in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].region.k


# Fused vLLM layers and the checkpoint modules stacked in them (vLLM's packed_modules_mapping of
# nearly every decoder); only planning without vLLM needs it, the engine is told by the model.
FUSED_LAYERS: Mapping[str, tuple[tuple[str, str | int], ...]] = {
    "qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
    "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
}
ROW_PARALLEL_MODULES = frozenset(
    {"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "wo", "w2", "fc2"}
)
REPLICATED_MODULES = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "gate", "router"})
# vLLM's DEFAULT_VOCAB_PADDING_SIZE: a vocabulary is padded to a multiple of it before it is cut.
VOCAB_PADDING = 64
KV_MODULES = frozenset({"k_proj", "v_proj"})


class UnevenSplit(ValueError):
    """A dimension cannot be cut into equal parts; the caller names the layer."""


def even_slice(size: int, tp_size: int, tp_rank: int, unit: str) -> tuple[int, int]:
    """The rank's `(start, stop)` of `size` indices.

    Raises:
        UnevenSplit: `size` is not a multiple of `tp_size`.
    """
    if size % tp_size:
        raise UnevenSplit(f"{size} {unit} cannot be cut into {tp_size} equal parts")
    share = size // tp_size
    return tp_rank * share, (tp_rank + 1) * share


def head_slice(n: int, heads: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """Rows of a key or value projection that a rank holds, whole heads replicated if need be.

    Raises:
        UnevenSplit: neither of `heads` and `tp_size` divides the other.
    """
    if tp_size <= heads:
        return even_slice(n, tp_size, tp_rank, f"out_features ({heads} key/value heads)")
    if tp_size % heads or n % heads:
        raise UnevenSplit(f"{heads} key/value heads cannot be replicated over {tp_size} ranks")
    head = tp_rank // (tp_size // heads)
    size = n // heads
    return head * size, (head + 1) * size


def style_of(module: str) -> ParallelStyle:
    """Parallel style by the module's last name, as vLLM's decoders use it."""
    name = module.rpartition(".")[2]
    if name in ROW_PARALLEL_MODULES:
        return ParallelStyle.ROW
    return ParallelStyle.REPLICATED if name in REPLICATED_MODULES else ParallelStyle.COLUMN


def shard_module(
    module: str,
    shard_id: str | int | None,
    n: int,
    k: int,
    style: ParallelStyle,
    tp_size: int,
    tp_rank: int,
    kv_heads: int | None = None,
) -> PartShard:
    """The rank's part of one `[n, k]` module.

    Raises:
        UnevenSplit: the split dimension is not divisible.
    """
    n_range, k_range = (0, n), (0, k)
    if style is ParallelStyle.ROW:
        k_range = even_slice(k, tp_size, tp_rank, "in_features")
    elif style is ParallelStyle.COLUMN:
        if kv_heads and module.rpartition(".")[2] in KV_MODULES:
            n_range = head_slice(n, kv_heads, tp_size, tp_rank)
        else:
            n_range = even_slice(n, tp_size, tp_rank, "out_features")
    return PartShard(module, shard_id, Region(*n_range, *k_range))


def shard_head(module: str, n: int, k: int, tp_size: int, tp_rank: int) -> LayerShard:
    """The rank's part of an lm_head of `n` tokens, padded as vLLM pads a vocabulary.

    Raises:
        UnevenSplit: the padded vocabulary is not divisible.
    """
    padded = -(-n // VOCAB_PADDING) * VOCAB_PADDING
    start, stop = even_slice(padded, tp_size, tp_rank, "padded vocabulary entries")
    region = Region(min(start, n), min(stop, n), 0, k)
    part = PartShard(module, None, region)
    return LayerShard(module, ParallelStyle.COLUMN, tp_size, (part,), stop - start - region.n)


def shard_embedding(
    module: str, n: int, k: int, tp_size: int, tp_rank: int, tied: bool
) -> LayerShard:
    """The rank's part of an input embedding, `tied` where it is the lm_head too.

    Raises:
        UnevenSplit: the padded vocabulary is not divisible.
    """
    shard = shard_head(module, n, k, tp_size, tp_rank)
    return replace(shard, gathered=True, multiplied=tied)
