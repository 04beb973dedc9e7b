"""What runs fused but is worth a word before serving; `fusedq check --strict` refuses it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusedq_kernels.choose.tuning import unused_files
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec
from vllm_fusedq.checkpoint.read import OTHER_FORMAT, Checkpoint
from vllm_fusedq.errors import Problem
from vllm_fusedq.formats import format_for
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.names import fold, unnumbered
from vllm_fusedq.plan.capacity import Capacity
from vllm_fusedq.plan.folding import fold_problems
from vllm_fusedq.plan.kv_cache import kv_cache_summary
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.model import ModelPlan


@dataclass(frozen=True, slots=True)
class Warned:
    """Layers, and what to know of them."""

    layer: str
    message: str


def warnings_for(
    checkpoint: Checkpoint, plan: ModelPlan, act_dtype: DType, capacity: Capacity
) -> list[Warned]:
    """Everything worth a word, equal words for numbered layers folded."""
    found: dict[str, list[str]] = defaultdict(list)
    fmt = format_for(checkpoint)
    for module in plan.unquantized:
        listed = fmt.listed_as(module) or fmt.is_router(module)
        if fmt.block_of(module) in fmt.quantized_blocks and not listed:
            found["a linear layer that the checkpoint leaves unquantized"].append(module)
    for layer in plan.layers:
        for use in layer.uses:
            for caution in use.kernel.cautions(layer.spec, act_dtype):
                found[caution].append(layer.name)
        if layer.rows > layer.k:
            found[_of_order(layer, fmt)].append(layer.name)
    told = listed_otherwise(fmt, plan.unquantized)
    return told + _folded(found) + _of_files(checkpoint) + _of_memory(checkpoint, capacity)


def notes_for(checkpoint: Checkpoint, capacity: Capacity, device: DeviceSpec) -> list[Warned]:
    """What is good to know and nothing to refuse: what was not read, not counted and not used."""
    found = unread_files(checkpoint)
    if cache := kv_cache_summary(format_for(checkpoint)):
        found.append(Warned(checkpoint.path, cache))
    if capacity.unmodelled:
        missing = f"not modelled, so no reason to refuse: {', '.join(capacity.unmodelled)}"
        message = f"the KV cache counts every token where no rule is known; {missing}"
        found.append(Warned(checkpoint.path, message))
    return found + [Warned("tuned rows", why) for why in unused_files(device)]


def listed_otherwise(fmt: CheckpointFormat, unquantized: Sequence[str]) -> list[Warned]:
    """Of the unquantized modules those that the config excludes by names with another prefix."""
    names = {module: name for module in unquantized if (name := fmt.listed_as(module))}
    if not names:
        return []
    kinds: dict[str, list[str]] = defaultdict(list)
    for module in names:
        kinds[unnumbered(module)].append(module)
    layers = ", ".join(fold(modules) for modules in kinds.values())
    listed = f"{fmt.exclusion} in the config lists them with another prefix"
    example = f"{next(iter(names.values()))} for {next(iter(names))}"
    return [Warned(layers, f"unquantized, as the file proves; {listed}: {example}")]


def unread_files(checkpoint: Checkpoint) -> list[Warned]:
    """Files that no weight of the model is in, all at once."""
    files = [name for name in checkpoint.unread if not name.startswith(OTHER_FORMAT)]
    if not files:
        return []
    return [Warned(checkpoint.path, f"not read, as no part of the model: {', '.join(files)}")]


def _of_files(checkpoint: Checkpoint) -> list[Warned]:
    files = [name for name in checkpoint.unread if name.startswith(OTHER_FORMAT)]
    if not files:
        return []
    message = f"vLLM loads {files[0]} in place of the model, unless with --load-format safetensors"
    return [Warned(checkpoint.path, message)]


def memory_problem(checkpoint: Checkpoint, capacity: Capacity) -> Problem | None:
    """The refusal where weights alone are larger than the memory that the server may use."""
    held = capacity.weights + capacity.metadata + capacity.unquantized
    if capacity.budget is None or held <= capacity.budget:
        return None
    return Problem(
        layer=checkpoint.path,
        found=f"{held / 1e9:.2f} GB of weights on a rank",
        supported=f"at most {capacity.budget / 1e9:.2f} GB, the part of the device that "
        "--gpu-memory-utilization allows",
        fix="use more ranks (--tensor-parallel-size, --pipeline-parallel-size) or a larger device",
    )


def _of_order(layer: LayerPlan, fmt: CheckpointFormat) -> str:
    share = f"{layer.rows / layer.k:.2f} times its share of the rows"
    size = f"{layer.bits_per_weight:.2f} bits per weight with the scales"
    where = f"at tensor_parallel_size {layer.shard.tp_size}"
    return f"its activation order takes {share}, {size}, {where}; quantize with {fmt.without_order}"


def _folded(found: Mapping[str, Sequence[str]]) -> list[Warned]:
    return [
        Warned(problem.layer, message)
        for message, layers in found.items()
        for problem in fold_problems(Problem(layer, message, "", "") for layer in layers)
    ]


def _of_memory(checkpoint: Checkpoint, capacity: Capacity) -> list[Warned]:
    if capacity.remains is None or capacity.remains >= 0 or memory_problem(checkpoint, capacity):
        return []
    if capacity.unmodelled:
        return []  # What is counted too much is no reason to refuse
    fits = f"the KV cache holds {capacity.kv_tokens} tokens"
    asked = f"{capacity.sequences} x {capacity.max_model_len}"
    advice = "lower --max-model-len or --max-num-seqs, or use more ranks"
    return [Warned(checkpoint.path, f"{fits}, fewer than the {asked} asked for; {advice}")]
