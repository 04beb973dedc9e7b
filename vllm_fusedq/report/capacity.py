"""The capacity plan as people read it."""

from rich import box
from rich.table import Table

from vllm_fusedq.plan.capacity import Capacity, Demand


def capacity_table(capacity: Capacity, demand: Demand) -> Table:
    """What the fullest rank holds, in GB (10**9 bytes)."""
    stage = ""
    if demand.pipeline_parallel_size > 1:
        stage = f" of pipeline stage {capacity.stage} of {demand.pipeline_parallel_size}"
    table = Table("GB", f"fullest rank{stage}", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.columns[0].justify = "right"
    estimate = f"activations: an estimate, for {demand.max_num_batched_tokens} tokens at once"
    for size, what in (
        (capacity.weights, "packed weights"),
        (capacity.metadata, "scales, zero points, activation order"),
        (capacity.unquantized, "layers that are not quantized, at the activations' dtype"),
        (capacity.workspace, "workspace of split K, sliced prefill, experts"),
        (capacity.activations, estimate),
        (capacity.kv_cache, _kv_label(capacity, demand)),
        (capacity.remains, _rest_label(capacity, demand)),
    ):
        table.add_row("unknown" if size is None else f"{size / 1e9:.3f}", what)
    return table


def kept_per_layer(capacity: Capacity) -> str:
    """What the layers keep of a sequence: "10 layers every token, 52 the last 1024 tokens"."""
    parts = [f"{count} {what}" for what, count in capacity.kv_layers.items()]
    return "layers by what they keep: " + ", ".join(parts)


def _kv_label(capacity: Capacity, demand: Demand) -> str:
    length = "unknown" if capacity.max_model_len is None else capacity.max_model_len
    dtype = demand.kv_cache_dtype.replace("auto", "the activations' dtype")
    size, whole = capacity.kv_bytes_per_token, capacity.kv_bytes_per_sequence
    kind = f"{dtype}, {'unknown' if size is None else size} bytes per token"
    if whole is not None:
        kind += f", {whole} per sequence"
    if len(capacity.kv_layers) > 1:
        kind += f"; {kept_per_layer(capacity)}"
    return f"KV cache for {capacity.sequences} x {length} tokens ({kind})"


def _rest_label(capacity: Capacity, demand: Demand) -> str:
    if capacity.memory is None:
        return "remains: the device's memory is not known"
    share = f"{demand.gpu_memory_utilization:g} of {capacity.memory / 1e9:.1f} GB"
    tokens = "" if capacity.kv_tokens is None else f"; room for {capacity.kv_tokens} tokens in all"
    return f"remains of {share}{tokens}"
