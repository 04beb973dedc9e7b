"""Rewrites a quantized checkpoint in the layout that stays resident (`formats/fusedq.py`).

Everything goes into the folder `OUT.partial`: each weight file under another name until it is
whole, config.json last. Only the finished folder is renamed to OUT, so a killed run leaves nothing
that loads, and the next run continues behind the last whole file.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusedq_kernels.choose.device import cpu_device
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.tiled import TILED
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
from vllm_fusedq.formats.fusedq import LAYOUT_VERSION, PERM, QWEIGHT, SCALES, ZEROS, FusedQFormat
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding
from vllm_fusedq.load.convert_journal import (
    JOURNAL,
    LOCK,
    Progress,
    begin,
    claimed,
    reading,
    sync,
    write_json,
    writing,
)
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer
from vllm_fusedq.plan.model import quantized_layers
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard

PARTIAL = ".partial"
# The striped CPU kernel reads the same layouts as the Triton kernels and refuses the fewest shapes.
TARGET = Target(cpu_device(fused_op=False), DType.FLOAT16)


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did; `resumed_files` were left whole by a killed run.

    `note` says where the values prove another convention than the config names, else it is empty.
    """

    layers: int
    source_bytes: int
    bytes: int
    resumed_files: int
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
) -> Converted:
    """Convert the checkpoint in `source` into the new folder `out`.

    Args:
        max_file_bytes: of the source, after which a new weight file begins; bounds the memory too.

    Raises:
        CheckpointError: `out` exists, or `out`.partial was begun from something else.
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
    items = _items(checkpoint, fmt)
    batches = _batches(items, max_file_bytes)
    partial = out.with_name(out.name + PARTIAL)
    with claimed(partial):
        hashes = begin(checkpoint, partial, max_file_bytes, progress)
        findings, resumed = _write_weights(checkpoint, batches, partial, progress)
        note = settle(findings)
        _copy_other_files(source, partial)
        config = _config(checkpoint, fmt, items, hashes)
        with writing(partial):
            for pattern in (JOURNAL, LOCK, "*.findings", "*.writing"):
                for leftover in partial.glob(pattern):
                    leftover.unlink()
            write_json(partial / CONFIG_FILE, config)
            sync(partial)
            partial.rename(out)
            sync(out.parent)
    return Converted(
        layers=sum(item.plan is not None for item in items),
        source_bytes=sum(item.nbytes for item in items),
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        resumed_files=resumed,
        note=note,
    )


def _items(checkpoint: Checkpoint, fmt: CheckpointFormat) -> list[_Item]:
    """Everything to write, in the order of the source's files; refuses all bad layers at once."""
    layers = quantized_layers(checkpoint, fmt)
    problems, items = [], []
    for module, stored in checkpoint.modules().items():
        layer, packed = layers.get(module), ()
        if layer is not None:
            packed = tuple(f"{module}.{tensor.name}" for tensor in layer.tensors)
            try:
                plan = _plan(layer)
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


def _plan(layer: LayerFormat) -> LayerPlan:
    part = PartShard(layer.module, None, layer.whole)
    shard = LayerShard(layer.module, ParallelStyle.REPLICATED, 1, (part,))
    if is_input_embedding(layer.module):
        shard = replace(shard, gathered=True, multiplied=False)
    return plan_layer(shard, {layer.module: layer}, TARGET)


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


def _write_weights(
    checkpoint: Checkpoint, batches: list[list[_Item]], partial: Path, progress: Progress
) -> tuple[dict[str, Finding], int]:
    """Write the weight files and, where there are several, their index.

    Returns what the values prove, by module, and how many files were there already.
    """
    count = len(batches)
    total, done, resumed = sum(item.nbytes for batch in batches for item in batch), 0, 0
    weight_map: dict[str, str] = {}
    findings: dict[str, Finding] = {}
    for number, batch in enumerate(batches, 1):
        path = partial / (
            "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        )
        proof = path.with_suffix(".findings")
        if path.exists():
            # Both were renamed when they were whole, this one last
            resumed += 1
            done += sum(item.nbytes for item in batch)
        else:
            tensors: dict[str, torch.Tensor] = {}
            proven: dict[str, Finding] = {}
            for item in batch:
                tensors |= _converted(checkpoint, item, proven)
                done += item.nbytes
                progress("converting", done, total)
            with writing(partial):
                write_json(proof, {name: asdict(finding) for name, finding in proven.items()})
                unfinished = path.with_suffix(".writing")
                save_file(tensors, unfinished, metadata={"format": "pt"})
                sync(unfinished)
                unfinished.rename(path)
        findings |= {n: Finding(**found) for n, found in json.loads(proof.read_text()).items()}
        weight_map |= dict.fromkeys(read_header(path), path.name)
    if count > 1:
        with writing(partial):
            write_json(partial / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return findings, resumed


def _converted(
    checkpoint: Checkpoint, item: _Item, findings: dict[str, Finding]
) -> dict[str, torch.Tensor]:
    """The tensors that stand for `item` in the converted checkpoint, by their full names."""
    stored = dict(_read(checkpoint, item.tensors))
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
    return {f"{item.name}.{suffix}": tensor.contiguous() for suffix, tensor in found.items()}


def _read(checkpoint: Checkpoint, names: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        path = Path(checkpoint.path) / checkpoint.tensors[name].file
        with reading(path), safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


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
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANT_SECTIONS}
    if isinstance(text_config := config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in text_config.items() if k not in QUANT_SECTIONS}
    return {**config, "quantization_config": section}
