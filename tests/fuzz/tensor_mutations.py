"""Damage to the tensors of a quantized module, before they are written."""

import random
from collections.abc import Callable

import torch

from harness import MANY, Draft

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool),
)


PLAIN = (torch.float16, torch.bfloat16, torch.float32)


def pick(draft: Draft, rng: random.Random) -> tuple[str, str]:
    """A quantized module and the full name of one of its tensors."""
    modules = {module: names for module, names in draft.modules().items() if names}
    module = rng.choice(list(modules))
    return module, rng.choice(modules[module])


def about(draft: Draft, module: str, *clues: str) -> None:
    """An error has to name the module, a fused layer that holds it, or one of `clues`."""
    parent, _, name = module.rpartition(".")
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    draft.clues += [module, f"{parent}.{fused.get(name, name)}", *clues]


def drop_tensor(draft: Draft, rng: random.Random) -> None:
    module, name = pick(draft, rng)
    del draft.tensors[name]
    about(draft, module)
    if not draft.modules()[module]:
        draft.may_lose_modules = True


def rename_tensor(draft: Draft, rng: random.Random) -> None:
    module, name = pick(draft, rng)
    suffixes = ["weight", "bias", "qweight", "scales", "g_idx", "x", "weight_scale", "", "SCALES"]
    new = f"{module}.{rng.choice(suffixes)}"
    renamed = draft.tensors.pop(name)
    if new in draft.tensors:
        draft.may_lose_modules = True  # what is left may be one tensor of a name that says nothing
    draft.tensors[new] = renamed
    draft.may_change(module)
    about(draft, module)
    if new == f"{module}.weight" and renamed.dtype in PLAIN:
        draft.may_lose_modules = True  # scales in a weight's place are one that is not quantized


def rename_module(draft: Draft, rng: random.Random) -> None:
    module, _ = pick(draft, rng)
    parent = module.rpartition(".")[0]
    endings = ["experts.0.up_proj", "x_proj", "embed_tokens", "lm_head", "a.b.c", "0", "..", "q"]
    new = rng.choice([f"{parent}.{ending}" for ending in endings] + ["lm_head", "x", ""])
    for name in draft.modules()[module]:
        draft.tensors[f"{new}.{name.removeprefix(module + '.')}"] = draft.tensors.pop(name)
    truths = dict(draft.truths)
    truths[new] = truths.pop(module)
    draft.truths = truths
    if module in draft.changed:
        draft.changed[new] = draft.changed.pop(module)
    draft.may_lose_modules = True
    about(draft, module, new or "tensors without a module's name", "experts")


def reshape_tensor(draft: Draft, rng: random.Random) -> None:
    module, name = pick(draft, rng)
    tensor = draft.tensors[name]
    if tensor.ndim == 0:
        tensor = tensor[None]  # reshaped before
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[: len(t) // 2],
        lambda t: t[:-1],
        lambda t: t[:0],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t[:1]]),
        lambda t: t.T if t.ndim == 2 else t,
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
        lambda t: t.unsqueeze(-1),
        lambda t: t[..., :1],
        lambda t: t.reshape(-1, 2) if t.numel() % 2 == 0 else t,
        lambda t: t.flatten()[0],
        lambda t: t.new_zeros(0, 2**40),
        lambda t: t.new_zeros(*[1] * 40),
    ]
    changed = rng.choice(changes)(tensor).contiguous()
    if changed.shape == tensor.shape and not torch.equal(changed, tensor):
        draft.may_change(module)  # a transposed square
    others = [draft.tensors[each] for each in draft.modules()[module] if each != name]
    if all(each.numel() == 1 for each in others):
        draft.may_change(module)  # only vLLM's layer knows its size
    draft.tensors[name] = changed
    about(draft, module)


def cast_tensor(draft: Draft, rng: random.Random) -> None:
    module, name = pick(draft, rng)
    tensor = draft.tensors[name]
    dtype = rng.choice((*DTYPES, torch.bfloat16))
    draft.tensors[name] = tensor.to(dtype)
    if not torch.equal(draft.tensors[name].double(), tensor.double()):
        draft.may_change(module)
    about(draft, module)


def poison_floats(draft: Draft, rng: random.Random) -> None:
    module, name = pick(draft, rng)
    tensor = draft.tensors[name].clone()
    if tensor.is_floating_point() and tensor.numel():
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 65504.0, 0.0, -1.0))
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        draft.tensors[name] = tensor
        draft.may_change(module)
    about(draft, module)


def poison_integers(draft: Draft, rng: random.Random) -> None:
    module, name = pick(draft, rng)
    tensor = draft.tensors[name].clone()
    if not tensor.is_floating_point() and tensor.dtype is not torch.bool and tensor.numel():
        bounds = torch.iinfo(tensor.dtype)
        value = rng.choice((bounds.min, bounds.max, 0, 1, bounds.max // 3))
        place = slice(None) if rng.random() < 0.3 else rng.randrange(tensor.numel())
        tensor.view(-1)[place] = value
        draft.tensors[name] = tensor
        draft.may_change(module)
    about(draft, module)


def flip_tensor_bit(draft: Draft, rng: random.Random) -> None:
    """One bit of the largest tensor, the packed weight, is one code; of another, anything."""
    module, name = pick(draft, rng)
    largest = max(draft.modules()[module], key=lambda each: draft.tensors[each].nbytes)
    tensor = draft.tensors[name].clone()
    if tensor.numel():
        raw = tensor.view(-1).view(torch.uint8)
        place = rng.randrange(raw.numel())
        raw[place] = int(raw[place]) ^ (1 << rng.randrange(8))
        draft.tensors[name] = tensor
        draft.may_change(module, 1 if name == largest else MANY)
    about(draft, module)


def swap_tensors(draft: Draft, rng: random.Random) -> None:
    a, b = pick(draft, rng), pick(draft, rng)
    draft.tensors[a[1]], draft.tensors[b[1]] = draft.tensors[b[1]], draft.tensors[a[1]]
    for module in (a[0], b[0]):
        if a != b:
            draft.may_change(module)
        about(draft, module)


def add_tensor(draft: Draft, rng: random.Random) -> None:
    module, _ = pick(draft, rng)
    where = rng.choice([module, module.rpartition(".")[0], "model", "x", f"{module}.lora_A"])
    suffix = rng.choice(["weight", "bias", "g_idx", "scales", "x", "weight_packed", "qweight"])
    name = f"{where}.{suffix}"
    shape = rng.choice([(), (1,), (64,), (64, 64), (0,), (8, 64)])
    if name not in draft.tensors:
        draft.tensors[name] = torch.ones(shape).to(rng.choice((torch.float16, torch.int32)))
    about(draft, module, where, name)
