"""A quantized lm_head for a generated checkpoint."""

from typing import Any

from checkpoints import ALL_BUILDS, Edit, Tensors, Truth

VOCABULARY = 32
# What the config of a method says where lm_head is quantized.
CONFIGS: dict[str, dict[str, Any]] = {"gptq": {"lm_head": True}, "ct": {"ignore": []}}


def quantized_head(build: str, hidden: int, group_size: int = 32) -> tuple[Truth, Edit]:
    """The truth of an lm_head in a builder's format, and the edit that puts it into the file."""
    made = ALL_BUILDS[build]
    truth = made.truth(VOCABULARY, hidden, group_size, seed=77)

    def edit(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{name}": t for name, t in made.tensors(truth).items()})

    return truth, edit


def config_with_head(build: str) -> dict[str, Any]:
    return CONFIGS[build.partition("-")[0]]
