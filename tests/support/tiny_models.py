"""The committed checkpoints and their references (made by tests/assets/scripts)."""

import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "assets"
UNQUANTIZED = "tiny-llama-bf16"
CHECKPOINTS = (
    "tiny-llama-awq-g128",
    "tiny-llama-gptq-g128",
    "tiny-llama-ct-sym-g128",
    "tiny-llama-ct-asym-g32",
)
MIXED = ("tiny-llama-gptq-mixed", "tiny-llama-ct-mixed")
"""Every other number of bits, several schemes in one checkpoint."""
TIED = ("tiny-llama-ct-tied",)
"""Embeddings quantized and tied; one block only."""
BITSANDBYTES = ("tiny-llama-bnb-nf4",)
MIXTURE = "tiny-qwen3-moe-ct-g64"
"""Random, and with experts."""


def asset(name: str) -> Path:
    """Directory of a committed checkpoint; a missing one is a failure, never a skip."""
    path = ASSETS / name
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is part of the repository and is missing")
    return path


def reference(name: str) -> dict[str, Any]:
    """fp32 log-probabilities, written with the producing library's own dequantization."""
    return json.loads((ASSETS / "references" / f"{name}.json").read_text())
