"""Rewrites a quantized checkpoint in the layout that stays resident (`formats/fusedq.py`).

Everything goes into the folder `OUT.partial`, config.json last, and only the finished folder is
renamed to OUT: a killed run leaves nothing that loads, and the next one begins again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fusedq_kernels.catalogue import CPU_STRIPED, Op
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.scales import of_rows
from fusedq_kernels.layouts.tiled import TILED
from fusedq_kernels.types import DeviceSpec
from vllm_fusedq.checkpoint.read import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    QUANT_CONFIG_FILES,
    QUANT_SECTIONS,
    Checkpoint,
    read_checkpoint,
)
from vllm_fusedq.checkpoint.safetensors_header import read_header
from vllm_fusedq.errors import CheckpointError, PreflightError, UnsupportedCheckpoint
from vllm_fusedq.formats import Finding, format_for, settle
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.fusedq import (
    LAYOUT_VERSION,
    PERM,
    QWEIGHT,
    ROW_SCALED,
    ROW_SCALES,
    SCALES,
    ZEROS,
    FusedQFormat,
)
from vllm_fusedq.formats.kv_cache import KV_CACHE_SCHEME
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.load.partial import claimed, publish, reading, writing
from vllm_fusedq.load.stored import stored_tensors
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer
from vllm_fusedq.plan.model import quantized_layers
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard

PARTIAL = ".partial"
# The striped CPU kernel reads the same layouts as all others and refuses the fewest shapes.
TARGET = Target(DeviceSpec("cpu", "cpu"), DType.FLOAT16, CPU_STRIPED.name)

Progress = Callable[[str, int, int], object]
"""Called with what is going on, the bytes of the source done and those in all."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did; `began_again` where it removed what a killed run had left.

    `note` says where the values prove another convention than the config names, else it is empty.
    """

    layers: int
    source_bytes: int
    bytes: int
    began_again: bool
    note: str


@dataclass(frozen=True, slots=True)
class _Item:
    """A quantized module, or one tensor that is copied; `tensors` are the source's names."""

    name: str
    plan: LayerPlan | None
    tensors: tuple[str, ...]
    nbytes: int


def convert(
    source: Path,
    out: Path,
    max_file_bytes: int = 2 << 30,
    progress: Progress = lambda what, done, total: None,
    keeps_activations: bool = False,
) -> Converted:
    """Convert the checkpoint in `source` into the new folder `out`.

    Args:
        max_file_bytes: of the source, after which a new weight file begins; bounds the memory too.
        keeps_activations: whether to take the weights of what quantizes activations too.

    Raises:
        CheckpointError: `out` exists, or an `out`.partial that no conversion made.
        OutputError: no room, no permission, or another process converts into `out`.
        UnsupportedCheckpoint, PreflightError: the checkpoint cannot be served, or is converted.
        WeightLoadError: a tensor holds values that cannot be right.
    """
    checkpoint = read_checkpoint(source)
    fmt = format_for(checkpoint)
    if isinstance(fmt, FusedQFormat):
        raise UnsupportedCheckpoint(f"{source}: is converted already; serve it as it is")
    if out.exists():
        raise CheckpointError(f"{out}: exists; remove it, or convert into another folder")
    items = _items(checkpoint, fmt, replace(TARGET, keeps_activations=keeps_activations))
    with claimed(out.with_name(out.name + PARTIAL)) as (partial, began_again):
        hashes = _hash_files(checkpoint, progress)
        note = _write_weights(checkpoint, _batches(items, max_file_bytes), partial, progress)
        _copy_other_files(source, partial)
        _write_json(partial / CONFIG_FILE, _config(checkpoint, fmt, items, hashes))
        publish(partial, out)
    return Converted(
        layers=sum(item.plan is not None for item in items),
        source_bytes=sum(item.nbytes for item in items),
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        began_again=began_again,
        note=note,
    )


def _items(checkpoint: Checkpoint, fmt: CheckpointFormat, target: Target) -> list[_Item]:
    """Everything to write, in the order of the source's files; refuses all bad layers at once."""
    layers = quantized_layers(checkpoint, fmt)
    problems, items = [], []
    for module, stored in checkpoint.modules().items():
        layer, packed = layers.get(module), ()
        if layer is not None:
            packed = tuple(f"{module}.{tensor.name}" for tensor in layer.tensors)
            try:
                plan = _plan(layer, target)
            except PreflightError as error:
                problems += error.problems
                continue
            nbytes = sum(checkpoint.tensors[name].nbytes for name in packed)
            items.append(_Item(module, plan, packed, nbytes))
        for suffix, info in stored.items():
            name = f"{module}.{suffix}" if module else suffix
            if name not in packed:
                items.append(_Item(name, None, (name,), info.nbytes))
    if problems:
        raise PreflightError(problems)
    return items


def _plan(layer: LayerFormat, target: Target) -> LayerPlan:
    part = PartShard(layer.module, None, layer.whole)
    shard = LayerShard(layer.module, ParallelStyle.REPLICATED, 1, (part,))
    if is_input_embedding(layer.module):
        shard = replace(shard, ops=(Op.EMBEDDING,))
    return plan_layer(shard, {layer.module: layer}, target)


def _batches(items: list[_Item], max_file_bytes: int) -> list[list[_Item]]:
    batches: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if batches[-1] and size + item.nbytes > max_file_bytes:
            batches.append([])
            size = 0
        batches[-1].append(item)
        size += item.nbytes
    return batches


def _hash_files(checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    """The SHA-256 of config.json and of every weight file of the source."""
    root, hashes, done = Path(checkpoint.path), {}, 0
    names = [CONFIG_FILE, *sorted({info.file for info in checkpoint.tensors.values()})]
    sizes = {name: (root / name).stat().st_size for name in names}
    for name in names:
        with reading(root / name), (root / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        done += sizes[name]
        progress("hashing", done, sum(sizes.values()))
    return hashes


def _write_weights(
    checkpoint: Checkpoint, batches: list[list[_Item]], partial: Path, progress: Progress
) -> str:
    """Write the weight files and, where there are several, their index; returns `Converted.note`.

    Raises:
        WeightLoadError: values that cannot be right, or layers that contradict each other.
    """
    count, done = len(batches), 0
    total = sum(item.nbytes for batch in batches for item in batch)
    weight_map: dict[str, str] = {}
    findings: dict[str, Finding] = {}
    for number, batch in enumerate(batches, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for item in batch:
            tensors |= _converted(checkpoint, item, findings)
            done += item.nbytes
            progress("converting", done, total)
        with writing(partial):
            save_file(tensors, partial / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(read_header(partial / name), name)
    if count > 1:
        _write_json(partial / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return settle(findings)


def _write_json(path: Path, value: object) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _converted(
    checkpoint: Checkpoint, item: _Item, findings: dict[str, Finding]
) -> dict[str, torch.Tensor]:
    """The tensors that stand for `item` in the converted checkpoint, by their full names."""
    stored = dict(stored_tensors(checkpoint, item.tensors))
    if item.plan is None:
        return stored
    loader = LayerLoader.create(item.plan, TARGET.act_dtype, torch.device("cpu"))
    for name, tensor in stored.items():
        loader.add(name.removeprefix(f"{item.name}."), tensor)
    loader.check_complete()
    findings |= loader.findings
    packed = loader.packed
    scales, zeros = TILED[packed.layout].read_groups(packed, 0, packed.n)
    found = {QWEIGHT: packed.qweight[:, : packed.n], SCALES: scales.T}
    if zeros is not None:
        found[ZEROS] = zeros.T
    if packed.perm is not None:
        found[PERM] = packed.perm
    if (row_scales := of_rows(packed)) is not None:
        found[ROW_SCALES] = row_scales[: packed.n]
    return {f"{item.name}.{suffix}": tensor.contiguous() for suffix, tensor in found.items()}


def _copy_other_files(source: Path, partial: Path) -> None:
    """Tokenizer, generation config, licenses: everything but weights and what describes them."""
    skipped = {CONFIG_FILE, INDEX_FILE, *QUANT_CONFIG_FILES}
    for file in sorted(source.iterdir()):
        if file.suffix in (".safetensors", *PICKLE_SUFFIXES) or file.name in skipped:
            continue
        if file.is_file():
            with reading(file):
                original = file.open("rb")
            with original, writing(partial), (partial / file.name).open("wb") as copy:
                shutil.copyfileobj(original, copy)


def _config(
    checkpoint: Checkpoint, fmt: CheckpointFormat, items: list[_Item], hashes: dict[str, str]
) -> dict[str, Any]:
    """The source's config.json with our quantization section in the place of its own."""
    schemes: list[dict[str, Any]] = []
    modules: dict[str, list[int]] = {}
    for item in items:
        if item.plan is None:
            continue
        scheme = {
            "weight_type": item.plan.spec.weight_type.value,
            "group_size": item.plan.spec.group_size,
            "ordered": item.plan.ordered,
        }
        if item.plan.spec.row_scaled:
            scheme[ROW_SCALED] = True
        if scheme not in schemes:
            schemes.append(scheme)
        modules[item.name] = [schemes.index(scheme), item.plan.n, item.plan.k]
    source = {"quant_method": fmt.name, "config": checkpoint.quant_config, "sha256": hashes}
    section = {
        "quant_method": FusedQFormat.name,
        "layout_version": LAYOUT_VERSION,
        "source": source,
        "schemes": schemes,
        "modules": modules,
    }
    if fmt.kv_cache_scheme:
        section[KV_CACHE_SCHEME] = fmt.kv_cache_scheme
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANT_SECTIONS}
    if isinstance(text_config := config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in text_config.items() if k not in QUANT_SECTIONS}
    return {**config, "quantization_config": section}
