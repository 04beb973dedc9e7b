"""One fuzz case: a checkpoint in memory, changed at random, written, read and loaded for one rank.

A case passes when it ends in a typed error that names what was changed, or in resident weights
that are right: the values are compared with the ones the checkpoint was built from, not with what
the code under test read.
"""

import copy
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from checkpoints import Truth, write_checkpoint
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts.packing import unpack
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import FusedQError
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import plan_model

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
DEVICES = {"cpu": cpu_device(), "gpu": device_by_name("h200")}
HANG_SECONDS = 60
MANY = 10**9


@dataclass
class Draft:
    """A checkpoint before it is written; `files` are raw files that replace or join the others.

    A mutation records what it may have changed: `changed` modules and at most how many of their
    values, words of which an error has to hold one (`clues`), and whether modules may be lost.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    truths: dict[str, Truth]
    files: dict[str, bytes] = field(default_factory=dict)
    after: list[Callable[[Path], object]] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    clues: list[str] = field(default_factory=list)
    any_module: int = 0
    may_lose_modules: bool = False
    log: list[str] = field(default_factory=list)

    @property
    def quant(self) -> dict[str, Any]:
        """The quantization section; an empty one where a mutation removed it."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    def modules(self) -> dict[str, list[str]]:
        """Quantized module -> the full names of its tensors that are still there."""
        return {
            module: [name for name in self.tensors if name.startswith(f"{module}.")]
            for module in self.truths
        }

    def module_of(self, name: str) -> str:
        """The quantized module that a tensor belongs to, else what stands before its last dot."""
        owners = (module for module in self.truths if name.startswith(f"{module}."))
        return next(owners, name.rpartition(".")[0])

    def may_change(self, module: str, values: int = MANY) -> None:
        self.changed[module] = self.changed.get(module, 0) + values

    def copy(self) -> "Draft":
        return Draft(dict(self.tensors), copy.deepcopy(self.config), self.truths)

    def write(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        files = {WEIGHTS: b"", CONFIG: b"", **self.files}
        for name, raw in files.items():
            (path / name).write_bytes(raw if name in self.files else self.serialized(name))
        for change in self.after:
            change(path)

    def serialized(self, name: str) -> bytes:
        """One of the two files as the tensors and the config stand now."""
        if name in self.files:
            return self.files[name]
        if name == CONFIG:
            return json.dumps(self.config).encode()
        tensors = {key: value.contiguous() for key, value in self.tensors.items()}
        return save(tensors, metadata={"format": "pt"})


def pristine(build: str, folder: Path, converted: bool, **sizes: int) -> Draft:
    """The checkpoint of a builder, or what `fusedq convert` makes of it."""
    path = folder / "pristine"
    truths = write_checkpoint(path, build, **sizes)
    if converted:
        convert(path, folder / "converted")
        path = folder / "converted"
    return Draft(load_file(path / WEIGHTS), json.loads((path / CONFIG).read_text()), truths)


@dataclass(frozen=True)
class Setting:
    """Where a case is loaded: a device's kernels, and one rank of so many."""

    device: str
    tp_size: int
    rank: int

    @classmethod
    def draw(cls, rng: random.Random) -> "Setting":
        tp_size = rng.choice((1, 1, 2, 4))
        return cls(rng.choice(list(DEVICES)), tp_size, rng.randrange(tp_size))


def load(path: Path, setting: Setting, dtype: torch.dtype) -> list[LayerLoader]:
    """Plan and load one rank as the engine does: every tensor of every file, in file order."""
    checkpoint = read_checkpoint(path)
    target = Target(DEVICES[setting.device], dtype, keeps_activations=True)
    plans = plan_model(checkpoint, target, setting.tp_size, ranks=[setting.rank]).layers
    loaders = [LayerLoader.create(plan, dtype, torch.device("cpu")) for plan in plans]
    wanted = {name: sink for loader in loaders for name, sink in _sinks(loader)}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        with safe_open(path / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(name)
                if sink := wanted.get(name):
                    sink(tensor)
    for loader in loaders:
        loader.check_complete()
    return loaders


def _sinks(loader: LayerLoader) -> Iterator[tuple[str, Callable[[torch.Tensor], None]]]:
    plan: LayerPlan = loader.plan
    for part, fmt in zip(plan.shard.parts, plan.formats, strict=True):
        for stored in fmt.tensors:

            def sink(
                tensor: torch.Tensor, name: str = stored.name, shard: object = part.shard_id
            ) -> None:
                loader.add(name, tensor, shard)

            yield f"{part.module}.{stored.name}", sink


def resident_values(loader: LayerLoader) -> torch.Tensor:
    """What the resident weight multiplies each in_feature by: fp64 `[N, K]`.

    A codebook's entries meet their scale in fp32, as the format defines; damaged ones may overflow.
    """
    weight = unpack(loader.packed)
    group_of = (torch.arange(weight.codes.shape[1]) + weight.phase) // weight.spec.group_size
    codebook = weight.spec.weight_type.codebook
    if codebook is not None:
        entries = torch.tensor(codebook)[weight.codes.long()]
        values = (entries * weight.scales.float()[:, group_of]).double()
    elif weight.zeros is None:
        values = weight.codes.double() - weight.spec.weight_type.bias
    else:
        values = weight.codes.double() - weight.zeros.double()[:, group_of]
    if codebook is None:
        values *= weight.scales.double()[:, group_of]
    if weight.row_scales is not None:
        values *= weight.row_scales.double()[:, None]
    if weight.perm is None:
        return values
    dense = values.new_zeros(values.shape[0], weight.in_features)
    return dense.index_add_(1, weight.perm.long(), values)


def verdict(draft: Draft, loaders: list[LayerLoader]) -> str | None:
    """What is wrong with weights that loaded, or None."""
    planned = set()
    budget = draft.any_module
    for loader in loaders:
        values, offset = resident_values(loader), 0
        scales = unpack(loader.packed).scales.float()
        if bool(values.isnan().any()) or not bool(torch.isfinite(scales).all()):
            return f"{loader.plan.prefix} holds NaN, or scales that are not finite"
        for part in loader.plan.shard.parts:
            planned.add(part.module)
            region, truth = part.region, draft.truths.get(part.module)
            rows = values[offset : offset + region.n]
            offset += region.n
            if truth is None:
                return f"{part.module} came from nowhere"
            bounds = (region.n_start, region.n_stop, region.k_start, region.k_stop)
            expected = truth.values(*bounds)
            # Without vLLM's sizes a layer whose packed weight was exchanged may be of another size
            same_size = rows.shape == expected.shape
            wrong = int((rows != expected).sum()) if same_size else rows.numel()
            allowed = draft.changed.get(part.module, 0)
            if wrong > allowed and budget > 0:
                budget, allowed = budget - 1, MANY
            if wrong > allowed:
                return f"{part.module} has {wrong} wrong values, at most {allowed} were changed"
    if planned != set(draft.truths) and not draft.may_lose_modules:
        return f"planned without {', '.join(sorted(set(draft.truths) - planned))}"
    return None


def run_case(draft: Draft, path: Path, setting: Setting, dtype: torch.dtype) -> str | None:
    """None if the case passed, else what happened."""
    draft.write(path)
    try:
        with hang_is_an_error():
            loaders = load(path, setting, dtype)
            return verdict(draft, loaders)
    except FusedQError as error:
        message = str(error)
        if not draft.log:
            return f"refused an untouched checkpoint: {message}"
        if any(clue in message for clue in draft.clues):
            return None
        return f"the error names none of {sorted(set(draft.clues))}: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Hang(BaseException):
    """Not an Exception: nothing under test may swallow it."""


@contextmanager
def hang_is_an_error() -> Iterator[None]:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
