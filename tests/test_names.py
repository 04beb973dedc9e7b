"""vLLM's names of layers and the checkpoint's, and names that are folded."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_fusedq.names import (
    fold,
    index_ranges,
    natural,
    stored_modules,
    stored_prefix,
    unnumbered,
    vllm_layer,
    with_other_prefix,
    without_prefix,
)

BLOCKS = [f"model.layers.{index}.mlp.down_proj" for index in range(12)]
STACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["c_fc_0", "c_fc_1"],
}
QKV = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")

HYBRID = (
    *QKV,
    "model.layers.0.mamba.in_proj",
    "model.layers.1.mamba.in_proj",
    "model.layers.0.mamba.out_proj",
    "model.layers.0.self_attn.out_proj",
)


@pytest.mark.parametrize(
    ("extra", "prefix", "stored"),
    [
        ("mtp_layers", "model.layers.12.mlp.down_proj", "model.mtp_layers.0.mlp.down_proj"),
        ("mtp_block", "model.layers.13.self_attn.o_proj", "model.mtp_block.1.self_attn.o_proj"),
        ("mtp_layers", "model.layers.11.mlp.down_proj", "model.layers.11.mlp.down_proj"),
        ("mtp_layers", "other.layers.12.mlp.down_proj", "other.layers.12.mlp.down_proj"),
        ("mtp_layers", "draft_model.model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("mtp_layers", "draft_model.lm_head", "lm_head"),
        ("something", "model.layers.12.mlp.down_proj", "model.layers.12.mlp.down_proj"),
    ],
)
def test_a_draft_s_names_in_the_checkpoint(extra: str, prefix: str, stored: str) -> None:
    modules = [*BLOCKS, f"model.{extra}.0.mlp.down_proj", f"model.{extra}.1.mlp.down_proj"]
    assert stored_prefix(prefix, modules) == stored


@pytest.mark.parametrize(
    ("prefix", "modules", "renamed", "expected"),
    [
        ("model.layers.0.self_attn.qkv_proj", QKV, {}, QKV),
        ("draft_model.model.layers.0.self_attn.qkv_proj", QKV, {}, QKV),
        # Stored as one (Phi-3), and one that the checkpoint does not have at all
        (
            "model.layers.0.self_attn.qkv_proj",
            ["model.layers.0.self_attn.qkv_proj"],
            {},
            ("model.layers.0.self_attn.qkv_proj",),
        ),
        ("visual.qkv_proj", QKV, {}, ("visual.qkv_proj",)),
        ("qkv_proj", ["q_proj"], {}, ("q_proj", "k_proj", "v_proj")),
        (
            "language_model.model.layers.0.self_attn.qkv_proj",
            QKV,
            {f"language_model.{module}": module for module in QKV},
            QKV,
        ),
        # A part of the name that vLLM's layer has not, by itself and in a fused layer
        ("tower.0.q_proj", ["tower.0.q_proj.linear"], {}, ("tower.0.q_proj.linear",)),
        ("tower.0.q_proj.linear", ["tower.0.q_proj.linear"], {}, ("tower.0.q_proj.linear",)),
        (
            "tower.qkv_proj",
            [f"tower.{part}_proj.linear" for part in "qkv"],
            {},
            tuple(f"tower.{part}_proj.linear" for part in "qkv"),
        ),
        (
            "tower.q_proj",
            ["model.tower.q_proj.linear"],
            {"tower.q_proj.linear": "model.tower.q_proj.linear"},
            ("model.tower.q_proj.linear",),
        ),
        (
            "language_model.lm_head",
            ["lm_head"],
            {"language_model.lm_head": "lm_head"},
            ("lm_head",),
        ),
        # Prefixes of a hybrid's own: by the only module of the block with that last name
        ("model.layers.0.mixer.in_proj", HYBRID, {}, ("model.layers.0.mamba.in_proj",)),
        ("model.layers.1.mixer.in_proj", HYBRID, {}, ("model.layers.1.mamba.in_proj",)),
        ("model.layers.0.qkv_proj", HYBRID, {}, QKV),
        ("model.2.mixer.in_proj", HYBRID, {}, ("model.layers.0.mamba.in_proj",)),
        ("model.3.mixer.in_proj", HYBRID, {}, ("model.layers.1.mamba.in_proj",)),
        (
            "lm.layers.0.mixer.in_proj",
            HYBRID,
            {f"lm.{module.removeprefix('model.')}": module for module in HYBRID},
            ("model.layers.0.mamba.in_proj",),
        ),
        # EXAONE's, and LFM2-VL's
        (
            "model.h.0.mlp.gate_up_proj",
            ["transformer.h.0.mlp.c_fc_0", "transformer.h.0.mlp.c_fc_1"],
            {},
            ("transformer.h.0.mlp.c_fc_0", "transformer.h.0.mlp.c_fc_1"),
        ),
        ("model.h.1.mlp.c_proj", ["transformer.h.0.mlp.c_proj"], {}, ("model.h.1.mlp.c_proj",)),
        (
            "language.model.layers.0.feed_forward.w2",
            ["model.language_model.layers.0.feed_forward.w2", "model.tower.layers.0.mlp.w2"],
            {
                "language_model.model.layers.0.feed_forward.w2": (
                    "model.language_model.layers.0.feed_forward.w2"
                )
            },
            ("model.language_model.layers.0.feed_forward.w2",),
        ),
        # Not one but two modules could be meant
        ("llm.h.0.fc", ["model.h.0.fc", "thinker.h.0.fc"], {}, ("llm.h.0.fc",)),
        ("model.layers.0.mixer.out_proj", HYBRID, {}, ("model.layers.0.mixer.out_proj",)),
        ("model.1.mixer.in_proj", HYBRID, {}, ("model.1.mixer.in_proj",)),
        ("model.4.mixer.in_proj", HYBRID, {}, ("model.4.mixer.in_proj",)),
    ],
)
def test_the_modules_of_a_layer(
    prefix: str, modules: list[str], renamed: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert stored_modules(prefix, modules, renamed, STACKED) == expected


def test_layers_that_a_model_does_not_say_it_stacks() -> None:
    """GPT-J and StableLM have no packed_modules_mapping."""
    modules = [f"transformer.h.0.attn.{name}_proj" for name in "qkv"]
    assert stored_modules("transformer.h.0.attn.qkv_proj", modules, {}, {}) == tuple(modules)


def test_the_layer_of_a_module() -> None:
    assert vllm_layer(QKV[1]) == ("model.layers.0.self_attn.qkv_proj", "k")
    assert vllm_layer("up_proj") == ("gate_up_proj", 1)
    assert vllm_layer("lm_head") == ("lm_head", None)


def test_numbered_names_are_folded_by_their_first_number() -> None:
    names = [f"a.layers.{index}.b.7.c" for index in (3, 0, 1, 10)]
    assert {unnumbered(name) for name in names} == {"a.layers.{}.b.7.c"}
    assert fold(names) == "a.layers.0-1,3,10.b.7.c"
    assert fold(["lm_head"]) == "lm_head"
    assert sorted(names, key=natural)[-1] == names[-1]
    assert index_ranges([3, 0, 1, 2, 7, 9, 8]) == "0-3,7-9"


def test_every_prefix_that_vllm_maps_is_one() -> None:
    """The language models' entries of its models' own name mappers."""
    models = Path(find_spec("vllm").origin).parent / "model_executor" / "models"
    pattern = re.compile(r'"([\w.]+\.)": "(language_model\.(?:model\.)?(?:layers\.|lm_head\.)?)"')
    mapped = {pair for file in models.rglob("*.py") for pair in pattern.findall(file.read_text())}
    assert len(mapped) > 10
    for stored, vllm in mapped:
        assert without_prefix(f"{stored}0.mlp") == without_prefix(f"{vllm}0.mlp"), stored


@pytest.mark.parametrize(
    ("module", "listed", "found"),
    [
        ("model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", "language_model.layers.1.mlp", True),
        ("model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up", False),
        ("model.layers.11.mlp.up_proj", "language_model.model.layers.1", False),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp", False),
        ("vision_tower.layers.1.fc1", "model.layers.1.fc1", False),
        ("model", "language_model", False),
    ],
)
def test_names_that_differ_in_their_prefix(module: str, listed: str, found: bool) -> None:
    name = with_other_prefix(module, {without_prefix(listed): listed})
    assert name == (listed if found else None)
