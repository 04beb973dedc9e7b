"""What one rank's memory holds: packed weights, what stays unquantized, workspace, KV cache.

Packed weights, metadata, unquantized tensors and workspace are computed from sizes, the KV cache as
vLLM's own specs and pool do it; activations are an estimate. `NOT_COUNTED` says what is left out.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import round_up
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.formats.shared.vocabulary import INPUT_EMBEDDINGS, LM_HEADS, is_head, is_tied
from vllm_fusedq.plan.kv_pool import CPU_POOL, GPU_POOL, Pool, PoolSettings, pool_of
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.layer_caches import Cache, LayerCaches, layer_caches
from vllm_fusedq.plan.model import ModelPlan
from vllm_fusedq.plan.shards import VOCAB_PADDING, ParallelStyle, style_of
from vllm_fusedq.plan.states import State

KV_DTYPE_BYTES = {"auto": None, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Of vLLM's `--kv-cache-dtype` those whose size is plain; "auto" is the activations' dtype."""

NOT_COUNTED = (
    "CUDA context and graphs, communication buffers, the blocks of draft models and of multi-token "
    "prediction, LoRA adapters, an image encoder's cache"
)
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_FINAL_NORMS = frozenset({"norm", "ln_f", "final_layernorm", "final_layer_norm"})


@dataclass(frozen=True, slots=True)
class Demand:
    """What a server is asked for; None as length is what the model's config allows."""

    max_model_len: int | None = None
    max_num_seqs: int = 1
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.92
    pipeline_parallel_size: int = 1
    max_num_batched_tokens: int = 8192
    pool: PoolSettings = GPU_POOL

    @property
    def in_flight(self) -> int:
        """Tokens that are scheduled and not yet settled, at most: every stage has a batch."""
        batches = self.pool.batches + self.pipeline_parallel_size - 1
        return batches * self.max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes on the fullest rank, that of pipeline stage `stage`.

    `kv_bytes_per_token` is what another token of a long sequence takes, `kv_bytes_per_sequence`
    what vLLM keeps ready for one of `max_model_len` tokens, windows and states included, and
    `kv_cache` that of `sequences`; None where the model's config does not give the sizes.
    `kv_layers` counts the layers of all stages by what they keep, `unmodelled` names what no rule
    is known for. `budget` is the part of `memory` that the server may use; None on a device whose
    memory is not known.
    """

    stage: int
    weights: int
    metadata: int
    unquantized: int
    workspace: int
    activations: int
    max_model_len: int | None
    sequences: int
    kv_bytes_per_token: int | None
    kv_bytes_per_sequence: int | None
    kv_layers: dict[str, int]
    unmodelled: tuple[str, ...]
    memory: int | None
    budget: int | None

    @property
    def fixed(self) -> int:
        return self.weights + self.metadata + self.unquantized + self.workspace + self.activations

    @property
    def for_kv_cache(self) -> int | None:
        """What is left for the KV cache; negative where the rest alone does not fit."""
        return None if self.budget is None else self.budget - self.fixed

    @property
    def kv_cache(self) -> int | None:
        """What the sequences asked for take."""
        per_sequence = self.kv_bytes_per_sequence
        return None if per_sequence is None else per_sequence * self.sequences

    @property
    def kv_tokens(self) -> int | None:
        """How many tokens of such sequences the KV cache can hold, vLLM's "KV cache size"."""
        if self.for_kv_cache is None or not self.kv_bytes_per_sequence or not self.max_model_len:
            return None
        return max(0, self.for_kv_cache) * self.max_model_len // self.kv_bytes_per_sequence

    @property
    def remains(self) -> int | None:
        """What is left with the KV cache for the given lengths."""
        if self.for_kv_cache is None or self.kv_cache is None:
            return None
        return self.for_kv_cache - self.kv_cache


def capacity_of(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    act_dtype: DType,
    demand: Demand,
    memory: int | None,
) -> Capacity:
    """The fullest rank's memory under `plan`.

    Args:
        checkpoint: its tensors and the model's config.
        plan: the quantized layers of one tensor-parallel rank, of all pipeline stages.
        act_dtype: dtype of the activations, in which vLLM also holds what is not quantized.
        demand: lengths, KV cache dtype, shares.
        memory: the device's bytes, None if unknown.
    """
    ranges = stage_ranges(block_count(checkpoint), demand.pipeline_parallel_size)
    length = demand.max_model_len or checkpoint.number("max_position_embeddings")
    caches = caches_of(checkpoint, plan.tp_size, act_dtype, demand)
    pool = None if caches is None else pool_of(caches, demand.pool.tokens)
    layers: list[list[LayerPlan]] = [[] for _ in ranges]
    unquantized = [0] * len(ranges)
    for layer in plan.layers:
        for stage in _stages_of(layer.prefix + ".", checkpoint, ranges):
            layers[stage].append(layer)
    for info in _loaded_as_stored(checkpoint, plan):
        for stage in _stages_of(info.name, checkpoint, ranges):
            unquantized[stage] += _rank_bytes(info, plan.tp_size, act_dtype)
    found = []
    for stage, (start, stop) in enumerate(ranges):
        found.append(
            Capacity(
                stage=stage,
                weights=sum(layer.weight_bytes for layer in layers[stage]),
                metadata=sum(layer.metadata_bytes for layer in layers[stage]),
                unquantized=unquantized[stage],
                workspace=max(map(workspace_bytes, layers[stage]), default=0),
                activations=_activations(
                    checkpoint, layers[stage], demand, stage == len(ranges) - 1
                ),
                max_model_len=length,
                sequences=demand.max_num_seqs,
                kv_bytes_per_token=None if pool is None else pool.token_bytes(start, stop),
                kv_bytes_per_sequence=_per_sequence(pool, length, demand, start, stop),
                kv_layers={} if caches is None else _counts(caches),
                unmodelled=() if caches is None else caches.unmodelled,
                memory=memory,
                budget=None if memory is None else int(memory * demand.gpu_memory_utilization),
            )
        )
    return max(found, key=lambda each: each.fixed + (each.kv_cache or 0))


def stage_ranges(blocks: int, stages: int) -> list[tuple[int, int]]:
    """First block and one past the last of each pipeline stage, as vLLM's `get_pp_indices` cuts.

    What does not divide goes one block each to the stages before the last, the later ones first.
    """
    sizes = [blocks // stages] * stages
    for index in range(blocks % stages):
        sizes[-2 - index] += 1
    ends = [sum(sizes[: index + 1]) for index in range(stages)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def block_count(checkpoint: Checkpoint) -> int:
    """Blocks of the decoder: by the config, else by the highest number in a tensor's name."""
    numbers = (int(match.group(1)) for name in checkpoint.tensors if (match := _BLOCK.search(name)))
    return checkpoint.number("num_hidden_layers") or 1 + max(numbers, default=0)


def caches_of(
    checkpoint: Checkpoint, tp_size: int, act_dtype: DType, demand: Demand
) -> LayerCaches | None:
    """What the decoder's blocks keep of a sequence on one rank; None if not to be known."""
    act_bytes = act_dtype.itemsize
    kv_bytes = KV_DTYPE_BYTES[demand.kv_cache_dtype] or act_bytes
    on_cpu = demand.pool is CPU_POOL
    return layer_caches(checkpoint, block_count(checkpoint), tp_size, kv_bytes, act_bytes, on_cpu)


def _per_sequence(
    pool: Pool | None, length: int | None, demand: Demand, start: int, stop: int
) -> int | None:
    if pool is None or length is None:
        return None
    return pool.sequence_bytes(length, demand.in_flight, start, stop)


def _counts(caches: LayerCaches) -> dict[str, int]:
    def name(cache: Cache) -> str:
        if isinstance(cache, State):
            return f"state of {cache.size} bytes"
        if cache.window is not None:
            return f"last {cache.window} tokens"
        return "every token" if cache.chunk is None else f"chunks of {cache.chunk} tokens"

    found = Counter(name(cache) for _, cache in caches)
    if without := sum(not each for each in caches.blocks):
        found["nothing of their own"] = without
    return dict(found)


def workspace_bytes(plan: LayerPlan) -> int:
    """The largest of what a call can need beside its output: the slice of a sliced prefill, or the
    partial sums of split K."""
    return max(use.workspace_bytes for use in plan.uses)


def _loaded_as_stored(checkpoint: Checkpoint, plan: ModelPlan) -> list[TensorInfo]:
    """All but the stored tensors of quantized layers, other ranks' experts included."""
    packed = {
        f"{fmt.module}.{stored.name}"
        for layer in plan.layers
        for fmt in layer.formats
        for stored in fmt.tensors
    }
    stacks = {layer.prefix for layer in plan.layers if layer.experts is not None}
    return [
        info
        for name, info in checkpoint.tensors.items()
        if name not in packed and not (stacks and _stack_of(name) in stacks)
    ]


def _stack_of(tensor: str) -> str | None:
    """What a tensor's name says of the layer of experts that it belongs to."""
    _, _, rest = tensor.partition(".experts.")
    return tensor[: -len(rest) - 1] if rest else None


def _stages_of(
    name: str, checkpoint: Checkpoint, ranges: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """The pipeline stages that hold a tensor; what lies outside of the decoder is on the first."""
    last = len(ranges) - 1
    parts = set(name.split("."))
    tied = is_tied(checkpoint)
    if parts & INPUT_EMBEDDINGS:
        return (0, last) if tied and last else (0,)
    if parts & LM_HEADS:
        return () if tied else (last,)
    if match := _BLOCK.search(name):
        index = int(match.group(1))
        return (next((i for i, (_, stop) in enumerate(ranges) if index < stop), last),)
    return (last,) if parts & _FINAL_NORMS else (0,)


def _rank_bytes(info: TensorInfo, tp_size: int, act_dtype: DType) -> int:
    """A tensor's bytes on one rank, cut as vLLM cuts layers of that name."""
    elements, sizes = prod(info.shape), info.shape
    module, _, suffix = info.name.rpartition(".")
    if set(module.split(".")) & (INPUT_EMBEDDINGS | LM_HEADS) and sizes:
        elements = -(-round_up(sizes[0], VOCAB_PADDING) // tp_size) * prod(sizes[1:])
    elif len(sizes) == 2 or (suffix == "bias" and len(sizes) == 1):
        axis = {ParallelStyle.COLUMN: 0, ParallelStyle.ROW: 1}.get(style_of(module))
        if axis is not None and axis < len(sizes) and sizes[axis] % tp_size == 0:
            elements //= tp_size
    return elements * act_dtype.itemsize if info.dtype in _FLOATS else info.nbytes


def _activations(
    checkpoint: Checkpoint, layers: Sequence[LayerPlan], demand: Demand, last: bool
) -> int:
    """An estimate: the widest layer's input and output beside the residual, and fp32 logits.

    An lm_head runs for one token of each sequence.
    """
    hidden = checkpoint.number("hidden_size") or 0
    inner = (layer for layer in layers if not is_head(layer.prefix))
    widest = max((layer.n for layer in inner), default=0)
    logits = 2 * 4 * demand.max_num_seqs * (checkpoint.number("vocab_size") or 0) if last else 0
    return 2 * demand.max_num_batched_tokens * (2 * hidden + widest + widest // 2) + logits
