"""A checkpoint as plain data: its config and what its safetensors headers list.

Reads no weights, imports neither torch nor vllm. What the quantization config means is the formats'
business.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_fusedq.checkpoint.files import CONFIG_FILE, CheckpointFiles, open_files
from vllm_fusedq.checkpoint.hub import Progress
from vllm_fusedq.checkpoint.safetensors_header import LFS_POINTER, LFS_WAY_OUT, TensorInfo
from vllm_fusedq.checkpoint.stacks import told_apart
from vllm_fusedq.errors import CheckpointError, UnsupportedCheckpoint

INDEX_FILE = "model.safetensors.index.json"
# Where config.json may hold the quantization section, and other files that may.
QUANT_SECTIONS = ("quantization_config", "compression_config")
QUANT_CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# PEFT's name for a LoRA adapter, and what begins the names of its tensors
ADAPTER_FILE, ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."
# Mistral's name for its own format: where vLLM finds such a file it loads no other, unless told to
OTHER_FORMAT = "consolidated"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# How many names deep a tensor may lie below another one that it belongs to
NESTED_NAMES = 2
MAX_METADATA_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about itself. Plain data, can be pickled.

    `quant_config` is the quantization section and `quant_source` where it was found: a key of
    config.json ("quantization_config", "compression_config") or a file's name. `tensors` maps full
    tensor names to what the headers say of them, quantized stacks of experts told apart
    (`stacks.py`), `metadata` those that hold no weights to their bytes: at most
    `MAX_METADATA_BYTES` single bytes that belong to another tensor. `unread` are the
    safetensors files beside the model's weights.
    """

    path: str
    config: dict[str, Any]
    quant_config: dict[str, Any]
    quant_source: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, bytes] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def number(self, *keys: str) -> int | None:
        """The first of the model config's sizes that is given, as a positive integer."""
        for key in keys:
            for section in config_sections(self.config):
                if type(value := section.get(key)) is int and value > 0:
                    return value
        return None

    def modules(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Module prefix -> {tensor suffix: TensorInfo}, in the order of the files.

        A tensor below the name of another one belongs to the same module: beside `up_proj.weight`,
        `up_proj.weight.absmax` is the `weight.absmax` of `up_proj`.
        """
        return self._modules

    @cached_property
    def _modules(self) -> dict[str, dict[str, TensorInfo]]:
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module = _owner(name, self.tensors).rpartition(".")[0]
            found.setdefault(module, {})[name[len(module) + bool(module) :]] = info
        return found


def config_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's config and, where it has one, that of its language model."""
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def read_checkpoint(
    model: str | Path, revision: str | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Read the config and the safetensors headers of a checkpoint.

    Args:
        model: a local directory, or the id of a repository on the Hugging Face hub ("owner/name"),
            of which no weight is downloaded.
        revision: a branch, tag or commit of the repository; means nothing to a directory.
        progress: told how many headers have come from the hub.

    Raises:
        CheckpointError: a file is missing, damaged, contradicts another one or is unsafe to read,
            or (RepositoryError) the repository cannot be read.
        UnsupportedCheckpoint: the checkpoint says nothing about quantization.
    """
    files = open_files(model, revision, progress)
    names, config = _model_config(files)
    found = _quant_config(files, names, config)
    if found is None:
        raise UnsupportedCheckpoint(
            f"{files.name}: no quantization_config in {CONFIG_FILE} and no "
            f"{' or '.join(QUANT_CONFIG_FILES)}: this checkpoint is not quantized; serve it "
            "without `--quantization fusedq`"
        )
    source, quant_config = found
    weight_map = _weight_map(files, names) if INDEX_FILE in names else {}
    tensors: dict[str, TensorInfo] = {}
    stored = _safetensors_files(names)
    weights = _weight_files(files, names, stored, weight_map)
    for header in files.headers(weights):
        for name, info in header.items():
            if name in tensors:
                raise CheckpointError(
                    f"{files.name}: tensor {name} is in {tensors[name].file} and in {info.file}; "
                    "remove the file that does not belong to this checkpoint"
                )
            tensors[name] = info
    _check_index(files, weight_map, tensors)
    metadata = _metadata(files, tensors)
    unread = tuple(name for name in stored if name not in weights)
    apart = told_apart(tensors)
    return Checkpoint(files.name, config, quant_config, source, apart, metadata, unread)


def read_config(model: str | Path, revision: str | None = None) -> tuple[dict[str, Any], bool]:
    """A model's config.json alone, quantized or not, and whether it is quantized.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    files = open_files(model, revision)
    names, config = _model_config(files)
    return config, _quant_config(files, names, config) is not None


def _model_config(files: CheckpointFiles) -> tuple[list[str], dict[str, Any]]:
    names = files.names()
    if CONFIG_FILE not in names:
        raise CheckpointError(f"{files.name}: {_no_config(names)}")
    config = _read_json(files, CONFIG_FILE)
    _check_architectures(files, config)
    return names, config


_ADAPTER_ALONE = (
    f"a LoRA adapter ({ADAPTER_FILE}) and no weights of a model; name the model that it was made "
    "for, and the adapter with `--enable-lora --lora-modules`"
)


def _no_config(names: Sequence[str]) -> str:
    if ADAPTER_FILE in names:
        return _ADAPTER_ALONE
    if any(name.endswith(".gguf") for name in names):
        return f"no {CONFIG_FILE}, but GGUF files, which are not supported; serve another format"
    return f"no {CONFIG_FILE} there: not a checkpoint; name the directory that holds it"


def _quant_config(
    files: CheckpointFiles, names: Sequence[str], config: dict[str, Any]
) -> tuple[str, dict[str, Any]] | None:
    for key in QUANT_SECTIONS:
        for section in config_sections(config):
            found = section.get(key)
            if found is None:
                continue
            if not isinstance(found, dict) or not found:
                raise CheckpointError(
                    f"{files.label(CONFIG_FILE)}: {key} is {found!r:.80}, expected a JSON object "
                    "that describes the quantization"
                )
            return key, found
    for name in QUANT_CONFIG_FILES:
        if name in names:
            return name, _read_json(files, name)
    return None


def _safetensors_files(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)


def _weight_files(
    files: CheckpointFiles,
    names: Sequence[str],
    stored: Sequence[str],
    weight_map: Mapping[str, str],
) -> list[str]:
    """Those of the `stored` files that vLLM loads the model from."""
    if weight_map:
        return sorted(set(weight_map.values()))
    found = [name for name in stored if name != ADAPTER_FILE]
    others = [name for name in found if name.startswith(OTHER_FORMAT)]
    if others and len(others) < len(found):
        raise CheckpointError(
            f"{files.name}: found {others[0]} beside {next(n for n in found if n not in others)} "
            f"and no {INDEX_FILE}: vLLM would load the former, or both; move what is not to be "
            "served out of the directory"
        )
    if found:
        return found
    if ADAPTER_FILE in stored:
        raise CheckpointError(f"{files.name}: {_ADAPTER_ALONE}")
    pickled = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickled:
        raise CheckpointError(
            f"{files.name}: found only pickled weights ({', '.join(pickled[:3])}), which can run "
            "code when they are read; convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{files.name}: no *.safetensors file; download the checkpoint again")


def _check_architectures(files: CheckpointFiles, config: Mapping[str, Any]) -> None:
    found = config.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{files.label(CONFIG_FILE)}: architectures is {found!r:.80}, expected a list of model "
            "class names; download the checkpoint again"
        )


def _weight_map(files: CheckpointFiles, names: Sequence[str]) -> dict[str, str]:
    path = files.label(INDEX_FILE)
    weight_map = _read_json(files, INDEX_FILE).get("weight_map")
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
    missing = sorted(set(weight_map.values()) - set(names))
    if missing:
        raise CheckpointError(
            f"{path}: names {len(missing)} missing file{'s' * (len(missing) != 1)}: "
            f"{', '.join(missing[:3])}; download the checkpoint again"
        )
    return weight_map


def _owner(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The tensor that `name` lies below, or itself."""
    owner = above = name
    for _ in range(NESTED_NAMES):
        above = above.rpartition(".")[0]
        owner = above if above in tensors else owner
    return owner


def _metadata(files: CheckpointFiles, tensors: Mapping[str, TensorInfo]) -> dict[str, bytes]:
    wanted = [
        info
        for name, info in tensors.items()
        if info.dtype == "U8"
        and len(info.shape) == 1
        and 0 < info.nbytes <= MAX_METADATA_BYTES
        and _owner(name, tensors) != name
    ]
    found = {}
    for info, data in zip(wanted, files.pieces(wanted), strict=True):
        if len(data) != info.nbytes:
            raise CheckpointError(
                f"{files.label(info.file)}: holds {len(data)} of the {info.nbytes} bytes of tensor "
                f"{info.name}; the file changed while it was read"
            )
        found[info.name] = data
    return found


def _check_index(
    files: CheckpointFiles, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file != file:
            where = f"it is in {found.file}" if found else "no file holds it"
            raise CheckpointError(
                f"{files.label(INDEX_FILE)}: says that tensor {name} is in {file}, but {where}; "
                "download the checkpoint again"
            )


def _read_json(files: CheckpointFiles, name: str) -> dict[str, Any]:
    label = files.label(name)
    raw = files.read(name)
    if raw.startswith(LFS_POINTER):
        raise CheckpointError(f"{label}: {LFS_WAY_OUT}")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: holds a JSON {type(value).__name__}, expected an object")
    return value
