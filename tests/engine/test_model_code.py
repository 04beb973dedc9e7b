"""Every architecture against plain models with the same dequantized weights.

In every run of the tests a few against transformers in fp32; with --all-models all, against vLLM's
own unquantized model in fp32. `scripts/architecture_table.py` writes a table of such a run.
"""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from architectures import ARCHITECTURES, Architecture
from architectures.base import VOCABULARY
from engines import EngineFailed, ask, generate, mean_error
from random_models import RandomModel, write_dequantized, write_random_model
from test_tensor_parallel import TWO_RANKS

pytestmark = pytest.mark.engine

PROMPTS = 6
CANDIDATES = [[(7 * i + 11 * j + 3) % VOCABULARY for i in range(24)] for j in range(48)]
LIMIT = 0.02
"""Of the mean absolute difference of log-probabilities, in nats."""
# In every run of the tests, on so many ranks: rows in head groups, rows of states, transformers'
# own model, a prefix.
ALWAYS = {
    "Falcon, AWQ": 2,
    "Falcon-H1, compressed-tensors": 2,
    "GPT-NeoX": 1,
    "Qwen2.5-VL": 1,
}
STAND_INS = Path(__file__).parent / "stand_ins"
ROOT = Path(__file__).resolve().parents[2]
TABLE = "| model | transformers' class |"


def answers(
    folder: Path, architecture: Architecture, model: Path, prompts: list[list[int]], **engine: Any
) -> tuple[list[list[float | None]], list[int]]:
    """Log-probabilities of each prompt's tokens and the token after it; text alone."""
    env = dict(TWO_RANKS) if engine.get("tensor_parallel_size") == 2 else {}
    if "vision_config" in architecture.settings:
        engine["language_model_only"] = True
        if importlib.util.find_spec("torchvision") is None:
            env["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(STAND_INS), os.environ.get("PYTHONPATH")])
            )
    found = generate(
        folder,
        model,
        prompts,
        env=env,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        **engine,
    )
    return [each["prompt_logprobs"] for each in found], [each["tokens"][0] for each in found]


def difference(found: list[list[float | None]], wanted: list[list[float | None]]) -> float:
    errors = [mean_error(a, b) for a, b in zip(found, wanted, strict=True)]
    return sum(errors) / len(errors)


def fused_layers(folder: Path, model: RandomModel) -> int:
    """How many layers are fused; together they hold every weight that the file quantizes."""
    rows = json.loads((folder / "plan.json").read_text())["layers"]
    held = sum(row["count"] * row["out_features"] * row["in_features"] for row in rows)
    assert held == sum(truth.codes.size for truth in model.truths.values())
    return sum(row["count"] for row in rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_as_plain_models(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Any, name: str
) -> None:
    every = request.config.getoption("--all-models")
    if not every and name not in ALWAYS:
        pytest.skip("needs --all-models")
    architecture = ARCHITECTURES[name]
    model = write_random_model(
        tmp_path / "model", architecture.config(), architecture.build, architecture.plain
    )
    prompts, tokens = model.sure_prompts(CANDIDATES, PROMPTS)
    expected = model.logprobs(prompts)
    record: dict[str, Any] = {"name": name, "class": type(model.model).__name__}
    record |= {"build": architecture.build, "ranks": {}}
    plan = {"fusedq": {"report": str(tmp_path / "plan.json")}}
    fused = {"quantization": "fusedq", "dtype": "bfloat16", "additional_config": plan}
    if architecture.refused:
        with pytest.raises(EngineFailed, match=re.escape(architecture.refused)):
            answers(tmp_path, architecture, model.path, prompts, **fused)
        record["refused"] = architecture.refused
    elif every:
        plain = write_dequantized(tmp_path / "plain", model)
        if architecture.fails:
            with pytest.raises(EngineFailed, match=re.escape(architecture.fails)):
                answers(tmp_path, architecture, plain, prompts, dtype="float32")
            record["fails"] = architecture.fails
        else:
            found, tokens = answers(tmp_path, architecture, plain, prompts, dtype="float32")
            record["apart"] = difference(found, expected)
            assert (record["apart"] > LIMIT / 10) == bool(architecture.apart)
            expected = found
    runs = not architecture.refused and not architecture.fails
    for ranks in (architecture.ranks if every else (ALWAYS[name],)) if runs else ():
        found, said = answers(
            tmp_path, architecture, model.path, prompts, tensor_parallel_size=ranks, **fused
        )
        record["ranks"][ranks] = difference(found, expected)
        assert record["ranks"][ranks] <= LIMIT
        assert said == tokens
        layers = int(re.search(r"fused: (\d+)", (tmp_path / "engine.log").read_text()).group(1))
        assert record.setdefault("layers", layers) == layers
        if ranks == 1:
            assert layers == fused_layers(tmp_path, model)
    record_property("architecture", json.dumps(record))


def test_the_table_names_these_architectures_alone() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.split(TABLE)[1].splitlines()[2:]]
    assert set(rows) <= set(ARCHITECTURES)


def test_model_code_that_rearranges_unknown_to_us_is_refused(tmp_path: Path) -> None:
    """A model class from outside of vLLM that reorders rows of what it loads."""
    architecture = ARCHITECTURES["Falcon"]
    model = write_random_model(tmp_path / "model", architecture.config(), architecture.build)
    with pytest.raises(EngineFailed) as error:
        ask("rearranging.py", tmp_path, {"engine": {"model": str(model.path)}}, None)
    said = str(error.value)
    assert "WeightLoadError: transformer.h.0.self_attention.dense.qweight: found a tensor" in said
    assert "is a model class from outside of vLLM" in said
