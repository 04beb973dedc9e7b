"""Reading a checkpoint directory: what is found, every refusal with its file and its way out."""

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint, write_json
from vllm_fusedq.checkpoint.files import LocalFiles
from vllm_fusedq.checkpoint.read import INDEX_FILE, Checkpoint, read_checkpoint
from vllm_fusedq.errors import CheckpointError, UnsupportedCheckpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "awq")
    return tmp_path / "model"


def edit_config(model: Path, **entries: object) -> None:
    path = model / "config.json"
    config = {**read_checkpoint(model).config, **entries}
    write_json(path, {key: value for key, value in config.items() if value is not None})


def split(model: Path, parts: int = 2) -> dict[str, str]:
    """Replace model.safetensors by several files with an index; returns the weight map."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        names = sorted(tensors)[part::parts]
        save_file({name: tensors[name] for name in names}, model / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(model / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return weight_map


def test_reads_a_checkpoint(model: Path) -> None:
    checkpoint = read_checkpoint(str(model))
    assert checkpoint.path == str(model)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.quant_config["quant_method"] == "awq"
    assert checkpoint.quant_source == "quantization_config"
    info = checkpoint.tensors["model.layers.0.mlp.up_proj.qweight"]
    assert (info.dtype, info.shape, info.file) == ("I32", (64, 12), "model.safetensors")
    assert "lm_head.weight" in checkpoint.tensors
    assert "lm_head.qweight" not in checkpoint.tensors
    assert set(checkpoint.modules()["model.layers.0.mlp.up_proj"]) == {
        "qweight",
        "qzeros",
        "scales",
    }
    assert set(checkpoint.modules()["lm_head"]) == {"weight"}


def test_survives_pickling(model: Path) -> None:
    checkpoint = read_checkpoint(model)
    checkpoint.modules()
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again == checkpoint
    assert again.modules() == checkpoint.modules()


def test_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_fusedq.checkpoint.read\n"
        "print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_split_files_read_like_one(model: Path) -> None:
    whole = read_checkpoint(model).tensors
    weight_map = split(model, 3)
    tensors = read_checkpoint(model).tensors
    assert tensors.keys() == whole.keys()
    assert {name: info.file for name, info in tensors.items()} == weight_map


def test_an_index_hides_other_files(model: Path) -> None:
    split(model)
    save_file({"other": torch.zeros(1)}, model / "adapter.safetensors")
    assert "other" not in read_checkpoint(model).tensors


def test_split_files_without_an_index(model: Path) -> None:
    split(model)
    (model / INDEX_FILE).unlink()
    assert "lm_head.weight" in read_checkpoint(model).tensors


ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize("indexed", [False, True], ids=["whole", "indexed"])
def test_an_adapter_beside_the_model_is_no_part_of_it(model: Path, indexed: bool) -> None:
    before = read_checkpoint(model).tensors
    if indexed:
        split(model)
    save_file({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 64)}, model / ADAPTER)
    checkpoint = read_checkpoint(model)
    assert checkpoint.tensors.keys() == before.keys()
    assert checkpoint.unread == (ADAPTER,)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone_is_no_model(model: Path, with_config: bool) -> None:
    (model / "model.safetensors").rename(model / ADAPTER)
    if not with_config:
        (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a LoRA adapter .*name the model that it was made"):
        read_checkpoint(model)


def test_consolidated_files_beside_an_index_are_not_read(model: Path) -> None:
    save_file(load_file(model / "model.safetensors"), model / "consolidated.safetensors")
    weight_map = split(model)
    checkpoint = read_checkpoint(model)
    assert {info.file for info in checkpoint.tensors.values()} == set(weight_map.values())
    assert checkpoint.unread == ("consolidated.safetensors",)


def test_consolidated_files_without_an_index_are_refused(model: Path) -> None:
    save_file(load_file(model / "model.safetensors"), model / "consolidated.safetensors")
    message = r"found consolidated.safetensors beside model.safetensors and no .*move what is not"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(model)


def test_consolidated_files_count_alone(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    assert "lm_head.weight" in read_checkpoint(model).tensors


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True], ids=["top", "text_config"])
def test_quantization_section_in_config(key: str, nested: bool, model: Path) -> None:
    section = {key: {"quant_method": "x"}}
    edit_config(model, quantization_config=None)
    (model / "quant_config.json").write_text("{}")
    config = {"text_config": section} if nested else section
    write_json(model / "config.json", config)
    checkpoint = read_checkpoint(model)
    assert checkpoint.quant_config == {"quant_method": "x"}
    assert checkpoint.quant_source == key


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantization_section_in_its_own_file(name: str, model: Path) -> None:
    edit_config(model, quantization_config=None)
    write_json(model / name, {"w_bit": 4})
    checkpoint = read_checkpoint(model)
    assert checkpoint.quant_config == {"w_bit": 4}
    assert checkpoint.quant_source == name


def test_no_quantization(model: Path) -> None:
    edit_config(model, quantization_config=None)
    with pytest.raises(UnsupportedCheckpoint, match=r"no quantization_config .*not quantized"):
        read_checkpoint(model)


def test_a_quantization_section_that_is_no_object(model: Path) -> None:
    edit_config(model, quantization_config="awq")
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config is 'awq'"):
        read_checkpoint(model)


@pytest.mark.parametrize("found", [1e308, "LlamaForCausalLM", {"a": 1}, [None]])
def test_architectures_that_are_no_list_of_names(found: object, model: Path) -> None:
    edit_config(model, architectures=found)
    with pytest.raises(CheckpointError, match=r"config.json: architectures is .*expected a list"):
        read_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "'/no/such/model': not a local directory, and not the id"),
        ("https://hub/owner/name", "'https://hub/owner/name': not a local directory"),
        ("", "'': not a local directory"),
        (Path("owner/name"), "owner/name: no such directory; .* `hf download owner/name`"),
    ],
)
def test_not_a_directory(name: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(name)


def test_a_file_in_place_of_its_directory(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: a file; name the directory of config"):
        read_checkpoint(model / "config.json")


def test_a_directory_that_may_not_be_listed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list any, so that this cannot be shown by a mode."""

    def denied(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(CheckpointError, match=f"{model}: cannot be read: Permission denied"):
        read_checkpoint(model)


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no config.json, but GGUF files, which are not sup"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_named(name: str, model: Path) -> None:
    (model / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345678\n"
    )
    with pytest.raises(CheckpointError, match=rf"{name}: .*a git-lfs pointer .* `git lfs pull`"):
        read_checkpoint(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json there: not a checkpoint; name the directory that holds it"),
        (b"{", "config.json: not JSON"),
        (b"\xff\xfe", "config.json: not JSON"),
        (b"[" * 200_000, "config.json: not JSON"),
        (b"[]", "config.json: holds a JSON list, expected an object"),
    ],
    ids=["missing", "cut", "not-utf8", "deep", "list"],
)
def test_bad_config(text: bytes | None, message: str, model: Path) -> None:
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(model)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file; download"):
        read_checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    message = rf"only pickled weights \({name}\), which can run code .* convert .* to safetensors"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(model)


def test_truncated_file(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors.*the file is truncated"):
        read_checkpoint(model)


def test_duplicate_tensor(model: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(1)}, model / "other.safetensors")
    message = "tensor lm_head.weight is in model.safetensors and in other.safetensors; remove"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(model)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map is missing"),
        ({}, "weight_map is missing or is not a filled JSON object"),
        ([1], "weight_map is missing or is not a filled JSON object"),
        ({"a": 1}, "tensor a is mapped to 1, expected the name of a file"),
        ({"a": "../a.safetensors"}, "tensor a is mapped to '../a.safetensors', expected the name"),
        ({"a": "/etc/passwd"}, "tensor a is mapped to '/etc/passwd', expected the name"),
        ({"a": "a.bin"}, "tensor a is mapped to a.bin, expected a .safetensors file"),
        ({"a": "a.safetensors", "b": "b.safetensors"}, "2 missing files: a.safetensors, b.safet"),
        ({"a": "a.safetensors"}, "1 missing file: a.safetensors; download"),
        ({"a": "model.safetensors"}, "tensor a is in model.safetensors, but no file holds it"),
    ],
)
def test_bad_index(weight_map: object, message: str, model: Path) -> None:
    index = {} if weight_map is None else {"weight_map": weight_map}
    write_json(model / INDEX_FILE, index)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(model)


def test_index_that_names_the_wrong_file(model: Path) -> None:
    weight_map = split(model)
    name = "lm_head.weight"
    actual = weight_map[name]
    wrong = next(file for file in weight_map.values() if file != actual)
    write_json(model / INDEX_FILE, {"weight_map": {**weight_map, name: wrong}})
    with pytest.raises(CheckpointError, match=f"{name} is in {wrong}, but it is in {actual}"):
        read_checkpoint(model)


def test_a_tensor_below_another_belongs_to_its_module() -> None:
    infos = dict.fromkeys(["a.b.weight", "a.b.weight.x", "a.b.weight.x.y", "c.weight.x", "d"])
    modules = Checkpoint("x", {}, {}, "", infos).modules()
    assert {module: sorted(stored) for module, stored in modules.items()} == {
        "a.b": ["weight", "weight.x", "weight.x.y"],
        "c.weight": ["x"],
        "": ["d"],
    }


def test_reads_small_bytes_below_another_tensor(model: Path) -> None:
    def pattern(size: int) -> torch.Tensor:
        return (torch.arange(size) % 251).to(torch.uint8)

    extra = {
        "a.weight": pattern(7),
        "a.weight.state": pattern(4096),
        "a.weight.state.inner": pattern(3),
        "a.weight.large": pattern(4097),
        "a.weight.empty": pattern(0),
        "a.weight.table": pattern(16).view(4, 4),
        "a.weight.words": pattern(16).view(torch.int32),
        "b.state": pattern(5),
    }
    tensors = {**load_file(model / "model.safetensors"), **extra}
    save_file(tensors, model / "model.safetensors")
    assert read_checkpoint(model).metadata == {
        name: extra[name].numpy().tobytes() for name in ("a.weight.state", "a.weight.state.inner")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda file: file.write_bytes(b""),
            "holds 0 of the 9 bytes of tensor a.x; the file",
        ),
        (Path.unlink, "model.safetensors: cannot be read: No such file"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], message: str
) -> None:
    file = model / "model.safetensors"
    save_file({"a": torch.zeros(1), "a.x": torch.zeros(9, dtype=torch.uint8)}, file)
    headers = LocalFiles.headers

    def headers_before_the_change(self: LocalFiles, names: list[str]) -> list[object]:
        found = list(headers(self, names))
        change(file)
        return found

    monkeypatch.setattr(LocalFiles, "headers", headers_before_the_change)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(model)
