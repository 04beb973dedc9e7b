"""What one tensor-parallel rank holds of a layer: slices of N, slices of K, replicated heads.

Pure arithmetic on logical indices. `layer.py` turns the slices into kernels and parameters,
`formats/layer.py` turns a `Region` into slices of stored tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from fusedq_kernels.catalogue import Op
from vllm_fusedq.formats.layer import Region
from vllm_fusedq.names import FUSED_LAYERS


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
    """A weight of a vLLM layer as a rank holds it: its parts stacked along N, one range of K.

    `padding` rows worth zero follow the parts: vLLM pads the vocabulary of an lm_head and of an
    embedding. `ops` is what is done with it, a product last: both with an embedding that is the
    lm_head too. `weight` tells the weights of a vLLM layer apart, and is empty where it has one.

    Of `experts`, those that the rank holds by their number in the model, each has its own parts,
    one after the other in `parts`; n and k are of one of them. Where `alternating` its two parts'
    rows come in turn (`layouts/stacked.py`); where `biased` each adds a bias, which lies beside it.
    A token asks `top_k` of the layer's `all_experts`.
    """

    prefix: str
    style: ParallelStyle
    tp_size: int
    parts: tuple[PartShard, ...]
    padding: int = 0
    ops: tuple[Op, ...] = (Op.MATMUL,)
    weight: str = ""
    experts: tuple[int, ...] | None = None
    alternating: bool = False
    biased: bool = False
    top_k: int = 0
    all_experts: int = 0

    @property
    def name(self) -> str:
        """What plans and errors call the weight; no other of the model has this name."""
        return f"{self.prefix}.{self.weight}" if self.weight else self.prefix

    @property
    def n(self) -> int:
        return self.held + self.padding

    @property
    def held(self) -> int:
        """Rows that come from the checkpoint; none at all where a rank holds padding only."""
        return sum(part.region.n for part in self.parts[: len(self.parts) // self.count])

    @property
    def count(self) -> int:
        """How many weights of this size there are: one for each expert."""
        return 1 if self.experts is None else len(self.experts)

    def of_expert(self, index: int) -> "LayerShard":
        """The weight of one of the rank's experts, by its place among them."""
        assert self.experts is not None
        each = len(self.parts) // len(self.experts)
        return replace(
            self,
            prefix=f"{self.prefix}.{self.experts[index]}",
            parts=self.parts[index * each : (index + 1) * each],
            ops=(Op.MATMUL,),
            experts=None,
        )

    @property
    def k(self) -> int:
        return self.parts[0].region.k


ROW_PARALLEL_MODULES = frozenset(
    {"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "wo", "w2", "fc2"}
)
# "linear" is that of a wrapped layer in Gemma 4's towers
REPLICATED_MODULES = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "linear"})
# vLLM's DEFAULT_VOCAB_PADDING_SIZE: a vocabulary is padded to a multiple of it before it is cut.
VOCAB_PADDING = 64
QKV_SHARD_IDS = tuple(shard_id for _, shard_id in FUSED_LAYERS["qkv_proj"])
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


def partition_parts(
    modules: Mapping[str, int | None],
    n_local: Sequence[int],
    k_local: int,
    style: ParallelStyle,
    tp_size: int,
    tp_rank: int,
    kv_replicas: int | None = None,
) -> tuple[tuple[PartShard, ...], dict[str, int]]:
    """The rank's parts of a layer, from the partition sizes that vLLM gave it.

    Args:
        modules: the checkpoint's in order, with their out_features, None where unquantized. One
            may hold several parts, which follow each other (Phi-3's qkv_proj).
        n_local, k_local: out_features of each part and in_features on this rank.
        kv_replicas: of a query, key and value layer: how many ranks hold the same key and value
            heads.

    Returns:
        The parts, and the out_features of each module on all ranks together.
    """
    k_start = tp_rank * k_local if style is ParallelStyle.ROW else 0
    n_ranks, n_rank = (tp_size, tp_rank) if style is ParallelStyle.COLUMN else (1, 0)
    copies = [kv_replicas if kv_replicas and index else 1 for index in range(len(n_local))]
    wholes = [n * n_ranks // each for n, each in zip(n_local, copies, strict=True)]
    totals: dict[str, int] = {}
    parts = []
    for index, module in enumerate(_holders(modules, wholes)):
        n, before = n_local[index], totals.get(module, 0)
        start = before + n_rank // copies[index] * n
        shard_id: str | int | None = None
        if len(n_local) > 1:
            shard_id = index if kv_replicas is None else QKV_SHARD_IDS[index]
        region = Region(start, start + n, k_start, k_start + k_local)
        parts.append(PartShard(module, shard_id, region))
        totals[module] = before + wholes[index]
    return tuple(parts), totals


def _holders(modules: Mapping[str, int | None], sizes: Sequence[int]) -> list[str]:
    """The module that holds each of the parts of these sizes: one each, or as many as fill it."""
    left = list(modules)
    if len(left) == len(sizes):
        return left
    holders: list[str] = []
    held = 0
    for size in sizes:
        if held == modules[left[0]] and len(left) > 1:
            left.pop(0)
            held = 0
        holders.append(left[0])
        held += size
    return holders


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
    return replace(shard, ops=(Op.EMBEDDING, Op.MATMUL) if tied else (Op.EMBEDDING,))
