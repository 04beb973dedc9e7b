"""Text, split and file helpers shared by the asset scripts.

The text is the source of Python's standard library, so it needs no download. It depends on the
interpreter's version: `corpus_sha256` identifies what was used.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sysconfig
from pathlib import Path

import torch

# Charmap tables and generated topic text are large and tell a language model nothing.
EXCLUDED_DIRS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
# Generated at build time, and different on every machine.
EXCLUDED_PREFIXES = ("_sysconfigdata",)
HOLDOUT_EVERY = 16
WINDOW = 512
HOLDOUT_WINDOWS = 96
PATH_KEYS = {"_name_or_path", "name_or_path", "offload_to_disk_path"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS & set(relative.parts[:-1]):
            continue
        if relative.name.startswith(EXCLUDED_PREFIXES):
            continue
        found.append((relative.as_posix(), path))
    return sorted(found)


def load_texts(held_out: bool) -> list[tuple[str, str]]:
    """Relative name and text of the files in one side of the split."""
    chosen = []
    for index, (name, path) in enumerate(stdlib_files()):
        if (index % HOLDOUT_EVERY == HOLDOUT_EVERY // 2) == held_out:
            text = path.read_text(encoding="utf-8", errors="strict")
            if text.strip():
                chosen.append((name, text))
    return chosen


def corpus_sha256(texts: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, text in texts:
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    return digest.hexdigest()


def token_stream(tokenizer, texts: list[tuple[str, str]]) -> torch.Tensor:
    """All files as one stream, each closed by the end token."""
    ids: list[int] = []
    for _, text in texts:
        ids.extend(tokenizer.encode(text, add_special_tokens=False))
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)


def windows(stream: torch.Tensor, bos: int, length: int, count: int) -> torch.Tensor:
    """Evenly spaced windows of `length` tokens, each opened by the start token."""
    body = length - 1
    starts = torch.linspace(0, len(stream) - body, count).long().tolist()
    rows = [torch.cat([torch.tensor([bos]), stream[s : s + body]]) for s in starts]
    return torch.stack(rows)


def holdout_windows(tokenizer) -> torch.Tensor:
    stream = token_stream(tokenizer, load_texts(held_out=True))
    return windows(stream, tokenizer.bos_token_id, WINDOW, HOLDOUT_WINDOWS)


def calibration_windows(tokenizer, samples: int = 64, length: int = 256) -> torch.Tensor:
    stream = token_stream(tokenizer, load_texts(held_out=False))
    return windows(stream, tokenizer.bos_token_id, length, samples)


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, rows: torch.Tensor, batch: int = 8) -> float:
    """Mean negative log-likelihood in nats per token, the start token not counted."""
    total = 0.0
    for chunk in rows.split(batch):
        logits = model(input_ids=chunk).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), chunk[:, 1:].reshape(-1), reduction="sum"
        ).item()
    return total / rows[:, 1:].numel()


def perplexity(loss: float) -> float:
    return math.exp(loss)


def sha256_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finish_directory(source: Path, target: Path) -> None:
    """Give a quantized model the base model's tokenizer and configurations free of paths."""
    clean_configs(target)
    # Tools rewrite the tokenizer's files in ways that depend on their transformers version.
    for name in ("chat_template.jinja", "added_tokens.json", "quant_log.csv"):
        (target / name).unlink(missing_ok=True)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        shutil.copyfile(source / name, target / name)


def clean_configs(directory: Path) -> None:
    """Drop entries that hold a machine's path, and the older of the two names of the dtype."""
    for path in (directory / "config.json", directory / "quantize_config.json"):
        if path.exists():
            config = without_paths(json.loads(path.read_text()))
            if "torch_dtype" in config:
                config["dtype"] = config.pop("torch_dtype")
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in directory.iterdir():
        path.chmod(0o644)


def without_paths(value):
    if isinstance(value, dict):
        return {k: without_paths(v) for k, v in value.items() if k not in PATH_KEYS}
    return value


def update_json(path: Path, value: dict) -> None:
    """Merge `value` into the JSON object stored at `path`."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.update(value)
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def write_reference(path: Path, reference: dict) -> None:
    """A line per prompt and per layer; log-probabilities as exact as the fp32 they come from."""
    prompts = [json.dumps(rounded(prompt)) for prompt in reference["prompts"]]
    layers = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in reference["layers"].items()]
    head = {k: v for k, v in reference.items() if k not in ("prompts", "layers")}
    lines = ",\n".join([json.dumps(head)[1:-1], '"prompts": [\n' + ",\n".join(prompts) + "]"])
    path.write_text("{" + lines + ',\n"layers": {\n' + ",\n".join(layers) + "}}\n")


def rounded(value):
    """Floats with 6 digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def save_random_llama(folder: Path, layers: int, **sizes: object) -> None:
    """A model whose linear layers are small: 64 x 64 in attention, 64 x 96 in the MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**(defaults | sizes))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    base = Path(__file__).parents[1] / "tiny-llama-bf16"
    for name in TOKENIZER_FILES:
        shutil.copyfile(base / name, folder / name)


def parts_of(stored: dict, module: str) -> dict:
    """The tensors of a module by the end of their names."""
    prefix = f"{module}."
    return {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}


def save_layers(out: Path, tool: str, settings: dict, stored: dict, values: dict) -> None:
    """The modules of `values` alone, with the SHA-256 of each weight, fp32 `[N, K]`, and of +0."""
    from safetensors.torch import save_file

    tensors = {name: part for name, part in stored.items() if name.rpartition(".")[0] in values}
    digests = {
        module: hashlib.sha256((weight.float() + 0.0).contiguous().numpy().tobytes()).hexdigest()
        for module, weight in values.items()
    }
    metadata = {"quantization_config": json.dumps(settings), "values_sha256": json.dumps(digests)}
    save_file(tensors, out, metadata={"tool": tool, **metadata})
