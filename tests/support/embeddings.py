"""Generated checkpoints whose input embedding is quantized, as llm-compressor writes them."""

import json
from pathlib import Path
from typing import Any

from checkpoints import ALL_BUILDS, Edit, Tensors, Truth, write_checkpoint, write_json

EMBEDDING = "model.embed_tokens"
VOCABULARY = 32


def write_with_embedding(
    path: Path,
    embedding: str = "ct-sym",
    *,
    tied: bool,
    group_size: int = 32,
    hidden: int = 64,
    dtype: Any = None,
    edits: tuple[Edit, ...] = (),
    **sizes: Any,
) -> dict[str, Truth]:
    """`write_checkpoint` of symmetric 4-bit linears with the embedding in a build of its own.

    Where `tied` there is no lm_head in the file; returns the truths, that of the embedding too.
    """
    made = ALL_BUILDS[embedding]
    options = {} if dtype is None else {"dtype": dtype}
    truth = made.truth(VOCABULARY, hidden, group_size, seed=91, **options)

    def edit(tensors: Tensors) -> None:
        del tensors[f"{EMBEDDING}.weight"]
        if tied:
            del tensors["lm_head.weight"]
        tensors.update({f"{EMBEDDING}.{name}": t for name, t in made.tensors(truth).items()})

    linear = ALL_BUILDS["ct-sym"].config(group_size)["config_groups"]["group_0"]
    config = made.config(group_size)
    group = {**config["config_groups"]["group_0"], "targets": ["Embedding"]}
    groups = {"group_0": linear, "group_1": {**group, "format": config["format"]}}
    truths = write_checkpoint(
        path,
        "ct-sym",
        hidden=hidden,
        group_size=group_size,
        edits=[edit, *edits],
        config={"config_groups": groups, "version": config["version"]},
        **options,
        **sizes,
    )
    model = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**model, "tie_word_embeddings": tied})
    return {**truths, EMBEDDING: truth}
