"""Names of layers: vLLM's against the checkpoint's, and names that differ in a number alone."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

# Fused vLLM layers and the checkpoint modules stacked in them (vLLM's packed_modules_mapping of
# nearly every decoder); only planning without vLLM needs it, the engine is told by the model.
FUSED_LAYERS: Mapping[str, tuple[tuple[str, str | int], ...]] = {
    "qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
    "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
}
# What vLLM puts before the names of a separate draft model.
DRAFT_PREFIX = "draft_model."
# Lists of extra blocks that vLLM numbers as if they followed those of the model (MiMo, ERNIE).
MTP_BLOCKS = ("mtp_layers", "mtp_block")

# What tools put before the names of one and the same model: those that vLLM's models map
_PREFIX_PARTS = frozenset(
    {"model", "language_model", "language", "text_model", "transformer", "thinker", "vlm", "llm"}
)

# Below the names of layers that a wrapper clamps (Gemma 4's vision and audio towers)
WRAPPED_LINEAR = ".linear"

# What the modules of one expert are called, by the names that vLLM has for their parts
EXPERT_PARTS: Mapping[str, str] = {
    **{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    **{"w1": "w1", "w3": "w3", "w2": "w2"},
}

_FUSED_NAMES = {name: (fused, sid) for fused, parts in FUSED_LAYERS.items() for name, sid in parts}
_STACKED = {fused: [name for name, _ in parts] for fused, parts in FUSED_LAYERS.items()}
_LAYER = re.compile(r"(.*\.|)layers\.(\d+)(\..+)")
_BEHIND = re.compile(r"(.*\.|)(\d+)(\..+)")
_INDEX = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"((?:.+\.)?experts)\.(\d+)\.(.+)")
_EXPERT_INDEX = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


class ExpertModule(NamedTuple):
    """A module of one expert: `model.layers.0.mlp.experts`, 17, `up_proj`."""

    stack: str
    index: int
    name: str

    @property
    def part(self) -> str | None:
        """vLLM's name for what it is of an expert (w1, w2, w3), None where it is none of them."""
        return EXPERT_PARTS.get(self.name)


def expert_module(module: str) -> ExpertModule | None:
    """The expert that a checkpoint module belongs to, None for all other modules."""
    match = _EXPERT.fullmatch(module)
    return None if match is None else ExpertModule(match[1], int(match[2]), match[3])


def lies_in_experts(module: str) -> bool:
    """Whether a module is, or lies in, what holds the experts of a layer."""
    return "experts" in module.split(".")


def vllm_layer(module: str) -> tuple[str, str | int | None]:
    """The vLLM layer that a checkpoint module is loaded into, and which part of it.

    All experts of a layer are one layer of vLLM's.
    """
    if expert := expert_module(module):
        return expert.stack, expert.part
    parent, _, name = module.rpartition(".")
    fused, shard_id = _FUSED_NAMES.get(name, (name, None))
    return f"{parent}.{fused}" if parent else fused, shard_id


def stored_modules(
    prefix: str,
    modules: Collection[str],
    renamed: Mapping[str, str],
    stacked: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    """The checkpoint's modules that vLLM stacks in its layer `prefix`, in order.

    Args:
        prefix: the layer's name in vLLM.
        modules: all of the checkpoint.
        renamed: vLLM's module names -> the checkpoint's, where a model renames its modules.
        stacked: vLLM's packed_modules_mapping, which some models leave out (GPT-J, StableLM).
    """
    stacked = {**_STACKED, **stacked}
    names = (prefix, stored_prefix(prefix, modules))
    for name in (*names, *(f"{name}{WRAPPED_LINEAR}" for name in names)):
        found = _stacked(name, modules, renamed, stacked)
        if any(module in modules for module in found):
            return found
    unknown = _stacked(names[-1], modules, renamed, stacked)
    return _by_place(names[1], modules, renamed, stacked) or unknown


def _by_place(
    name: str,
    modules: Collection[str],
    renamed: Mapping[str, str],
    stacked: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    """The modules of a layer that vLLM gives another name than its own path; () where unsure.

    Those at the same path but for its prefix (of EXAONE `model.h.0` is `transformer.h.0`), or the
    only ones of the block with that last name: hybrids call a Mamba layer `layers.0.mixer.in_proj`
    that is stored as `layers.0.mamba.in_proj`, and Falcon-H1 leaves out its `self_attn`.
    """
    parent, _, last = name.rpartition(".")
    wanted = {last, *stacked.get(last, ())}
    stored_in: dict[str, set[str]] = defaultdict(set)
    for known, stored in (*((module, module) for module in modules), *renamed.items()):
        outer, _, name_in_it = known.rpartition(".")
        if name_in_it in wanted:
            stored_in[f"{without_prefix(outer)}."].add(stored.rpartition(".")[0])
    block = _block(name, modules)
    in_block = (each for outer, each in stored_in.items() if block and outer.startswith(block))
    at_path = stored_in.get(f"{without_prefix(parent)}.", set()) if parent else set()
    found = at_path or set().union(*in_block)
    return _stacked(f"{found.pop()}.{last}", modules, {}, stacked) if len(found) == 1 else ()


def _block(name: str, modules: Collection[str]) -> str:
    """Up to its number the block of a module, without its prefix; "" where it is in none.

    Falcon-H1 numbers its Mamba layers as if they followed the blocks: of 2, `model.2` is in
    `model.layers.0`.
    """
    if match := _LAYER.fullmatch(name):
        return without_prefix(f"{match[1]}layers.{match[2]}.")
    if match := _BEHIND.fullmatch(name):
        index = int(match[2]) - _blocks(modules, match[1])
        return without_prefix(f"{match[1]}layers.{index}.") if index >= 0 else ""
    return ""


def _blocks(modules: Collection[str], before: str) -> int:
    """How many blocks are below `before`."""
    indices = (int(m[2]) for name in modules if (m := _LAYER.fullmatch(name)) and m[1] == before)
    return max(indices, default=-1) + 1


def _stacked(
    name: str,
    modules: Collection[str],
    renamed: Mapping[str, str],
    stacked: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    """The modules under `name` itself, or under those of what it stacks that the checkpoint has."""
    own = renamed.get(name, name)
    inner = WRAPPED_LINEAR if name.endswith(WRAPPED_LINEAR) else ""
    parent, _, last = name.removesuffix(inner).rpartition(".")
    parts = [f"{parent}.{part}{inner}" if parent else part for part in stacked.get(last, ())]
    found = tuple(renamed.get(part, part) for part in parts)
    return (own,) if own in modules or not any(part in modules for part in found) else found


def stored_experts(prefix: str, modules: Collection[str], renamed: Mapping[str, str]) -> str:
    """What the checkpoint calls the experts that vLLM's layer `prefix` holds.

    Arguments are those of `stored_modules`.
    """
    for name in dict.fromkeys((prefix, stored_prefix(prefix, modules))):
        for part in EXPERT_PARTS:
            own = renamed.get(f"{name}.0.{part}", f"{name}.0.{part}")
            if own in modules and (expert := expert_module(own)):
                return expert.stack
    return prefix


def stored_prefix(prefix: str, modules: Collection[str]) -> str:
    """The checkpoint's name for the prefix that vLLM gives a module of a draft model.

    Args:
        prefix: like "draft_model.model.layers.0.mlp.down_proj", or "model.layers.28.mlp.down_proj"
            for the first block of multi-token prediction behind 28 blocks.
        modules: all of the checkpoint.
    """
    prefix = prefix.removeprefix(DRAFT_PREFIX)
    match = _LAYER.fullmatch(prefix)
    if match is None:
        return prefix
    before, index, rest = match[1], int(match[2]), match[3]
    behind = index - _blocks(modules, before)
    lists = {name.removeprefix(before).partition(".")[0] for name in modules}
    extra = [name for name in MTP_BLOCKS if name in lists]
    return f"{before}{extra[0]}.{behind}{rest}" if behind >= 0 and extra else prefix


def without_prefix(name: str) -> str:
    """A module's name without its prefix: `layers.0.mlp` of `model.language_model.layers.0.mlp`."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part not in _PREFIX_PARTS), len(parts) - 1)
    return ".".join(parts[first:])


def with_other_prefix(module: str, listed: Mapping[str, str]) -> str | None:
    """The listed name that is `module` or what it lies in, but for the prefix.

    Args:
        module: like "model.layers.1.mlp.down_proj".
        listed: names by what `without_prefix` leaves, like "layers.1.mlp" for "model.layers.1.mlp".
    """
    parts = without_prefix(module).split(".")
    outer = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    name = next((listed[each] for each in outer if each in listed), None)
    # With the same prefix a name means what the tools match, no more
    return None if name is None or f"{module}.".startswith(f"{name}.") else name


def parameter_name(tensor: str) -> str:
    """What the vLLM layer calls a checkpoint tensor; torch allows no dots."""
    return tensor.replace(".", "_")


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10; files list tensors in any order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def first_number(name: str) -> int | None:
    """The number in which `unnumbered` names differ."""
    match = _INDEX.search(f"{name}.")
    return int(match[1]) if match else None


def unnumbered(name: str) -> str:
    """What names that differ in their first number alone have in common."""
    return _INDEX.sub(".{}.", name, count=1)


def fold(names: Sequence[str]) -> str:
    """Names that differ in their first number alone as one: `model.layers.0-31.mlp.down_proj`."""
    indices = [int(match[1]) for name in names if (match := _INDEX.search(name))]
    return _INDEX.sub(f".{index_ranges(indices)}.", names[0], count=1)


def unexperted(name: str) -> str:
    """What names that differ in the number of an expert alone have in common."""
    return _EXPERT_INDEX.sub("{}", name, count=1)


def fold_experts(names: Sequence[str]) -> str:
    """Names that differ in the number of an expert alone as one: `..experts.0-7.up_proj`."""
    indices = [int(match[0]) for name in names if (match := _EXPERT_INDEX.search(name))]
    return _EXPERT_INDEX.sub(index_ranges(indices), names[0], count=1)


def index_ranges(indices: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
