"""A checkpoint directory as plain data: its config and what its safetensors headers list.

Reads no weights, imports neither torch nor vllm. What the quantization config means is the formats'
business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_fusedq.errors import CheckpointError, UnsupportedCheckpoint
from vllm_fusedq.safetensors_header import TensorInfo, read_header

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
QUANT_CONFIG_FILES = ("quantize_config.json", "quant_config.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about itself. Plain data, can be pickled.

    `quant_config` is the quantization section and `quant_source` where it was found: a key of
    config.json ("quantization_config", "compression_config") or a file's name. `tensors` maps full
    tensor names to what the headers say of them.
    """

    path: str
    config: dict[str, Any]
    quant_config: dict[str, Any]
    quant_source: str
    tensors: dict[str, TensorInfo]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def modules(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Module prefix -> {tensor suffix: TensorInfo}, in the order of the files."""
        return self._modules

    @cached_property
    def _modules(self) -> dict[str, dict[str, TensorInfo]]:
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            found.setdefault(module, {})[suffix] = info
        return found


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the config and the safetensors headers of a local checkpoint directory.

    Raises:
        CheckpointError: a file is missing, damaged, contradicts another one or is unsafe to read.
        UnsupportedCheckpoint: the checkpoint says nothing about quantization.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(
            f"{root}: not a local directory; download the model first, for example with "
            "`hf download`, and name the directory"
        )
    config = _read_json(root / CONFIG_FILE)
    source, quant_config = _quant_config(root, config)
    tensors: dict[str, TensorInfo] = {}
    weight_map = _weight_map(root) if (root / INDEX_FILE).exists() else {}
    for file in _weight_files(root, weight_map):
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{root}: tensor {name} is in {tensors[name].file} and in {info.file}; "
                    "remove the file that does not belong to this checkpoint"
                )
            tensors[name] = info
    _check_index(root, weight_map, tensors)
    return Checkpoint(str(root), config, quant_config, source, tensors)


def _quant_config(root: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    text_config = config.get("text_config")
    sections = [config, text_config if isinstance(text_config, dict) else {}]
    for key in ("quantization_config", "compression_config"):
        for section in sections:
            found = section.get(key)
            if found is None:
                continue
            if not isinstance(found, dict) or not found:
                raise CheckpointError(
                    f"{root / CONFIG_FILE}: {key} is {found!r:.80}, expected a JSON object that "
                    "describes the quantization"
                )
            return key, found
    for name in QUANT_CONFIG_FILES:
        if (root / name).exists():
            return name, _read_json(root / name)
    raise UnsupportedCheckpoint(
        f"{root}: no quantization_config in {CONFIG_FILE} and no {' or '.join(QUANT_CONFIG_FILES)}:"
        " this checkpoint is not quantized; serve it without `--quantization fusedq`"
    )


def _weight_files(root: Path, weight_map: Mapping[str, str]) -> list[Path]:
    if weight_map:
        return [root / name for name in sorted(set(weight_map.values()))]
    files = sorted(root.glob("*.safetensors"))
    if any(file.name.startswith("model") for file in files):
        # Mistral repositories hold the same weights a second time, under other names
        files = [file for file in files if not file.name.startswith("consolidated")]
    if files:
        return files
    pickled = sorted(file.name for file in root.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{root}: found only pickled weights ({', '.join(pickled[:3])}), which can run code "
            "when they are read; convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{root}: no *.safetensors file; download the checkpoint again")


def _weight_map(root: Path) -> dict[str, str]:
    path = root / INDEX_FILE
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or is not a filled JSON object")
    for tensor, name in weight_map.items():
        # Anything else could point outside of the checkpoint
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path}: tensor {tensor} is mapped to {name!r:.80}, expected the name of a file "
                "in the same directory"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {tensor} is mapped to {name}, expected a .safetensors file"
            )
    missing = sorted(name for name in set(weight_map.values()) if not (root / name).exists())
    if missing:
        raise CheckpointError(
            f"{path}: names {len(missing)} missing file{'s' * (len(missing) != 1)}: "
            f"{', '.join(missing[:3])}; download the checkpoint again"
        )
    return weight_map


def _check_index(
    root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file != file:
            where = f"it is in {found.file}" if found else "no file holds it"
            raise CheckpointError(
                f"{root / INDEX_FILE}: says that tensor {name} is in {file}, but {where}; "
                "download the checkpoint again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
