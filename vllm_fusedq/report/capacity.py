"""The capacity plan as people read it."""

from rich import box
from rich.table import Table

from vllm_fusedq.plan.capacity import MAX_BATCHED_TOKENS, Capacity, Demand


def capacity_table(capacity: Capacity, demand: Demand) -> Table:
    """What the fullest rank holds, in GB (10**9 bytes)."""
    stage = ""
    if demand.pipeline_parallel_size > 1:
        stage = f" of pipeline stage {capacity.stage} of {demand.pipeline_parallel_size}"
    table = Table("GB", f"fullest rank{stage}", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.columns[0].justify = "right"
    estimate = f"activations: an estimate, for {MAX_BATCHED_TOKENS} tokens at once"
    for size, what in (
        (capacity.weights, "packed weights"),
        (capacity.metadata, "scales, zero points, activation order"),
        (capacity.unquantized, "layers that are not quantized, at the activations' dtype"),
        (capacity.workspace, "workspace of split K and sliced prefill"),
        (capacity.activations, estimate),
        (capacity.kv_cache, _kv_label(capacity, demand)),
        (capacity.remains, _rest_label(capacity, demand)),
    ):
        table.add_row("unknown" if size is None else f"{size / 1e9:.3f}", what)
    return table


def _kv_label(capacity: Capacity, demand: Demand) -> str:
    length = "unknown" if capacity.max_model_len is None else capacity.max_model_len
    dtype = demand.kv_cache_dtype.replace("auto", "the activations' dtype")
    size = capacity.kv_bytes_per_token
    kind = f"{dtype}, {'unknown' if size is None else size} bytes per token"
    return f"KV cache for {capacity.sequences} x {length} tokens ({kind})"


def _rest_label(capacity: Capacity, demand: Demand) -> str:
    if capacity.memory is None:
        return "remains: the device's memory is not known"
    share = f"{demand.gpu_memory_utilization:g} of {capacity.memory / 1e9:.1f} GB"
    tokens = "" if capacity.kv_tokens is None else f"; room for {capacity.kv_tokens} tokens in all"
    return f"remains of {share}{tokens}; CUDA context and graphs, communication not counted"
