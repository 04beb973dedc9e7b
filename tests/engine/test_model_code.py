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
from random_models import SURE, RandomModel, write_dequantized, write_random_model
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
) -> list[dict[str, Any]]:
    """What `generate` says, of text alone."""
    env = dict(TWO_RANKS) if engine.get("tensor_parallel_size") == 2 else {}
    if architecture.sees:
        engine["language_model_only"] = True
    # Qwen3.5 without images lies in the file of the one with them
    imports_torchvision = architecture.sees or architecture.model_type == "qwen3_5_text"
    if imports_torchvision and importlib.util.find_spec("torchvision") is None:
        paths = [str(STAND_INS), os.environ.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return generate(
        folder,
        model,
        prompts,
        env=env,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        **engine,
    )


def difference(found: list[dict[str, Any]], wanted: list[list[float | None]]) -> float:
    pairs = zip(found, wanted, strict=True)
    return sum(mean_error(each["prompt_logprobs"], b) for each, b in pairs) / len(wanted)


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
    sure = range(PROMPTS)
    expected = model.logprobs(prompts)
    record: dict[str, Any] = {"name": name, "class": type(model.model).__name__}
    record |= {"build": architecture.build, "ranks": {}}
    plan = {"fusedq": {"report": str(tmp_path / "plan.json")}}
    fused = {"quantization": "fusedq", "dtype": architecture.dtype, "additional_config": plan}
    if architecture.refused:
        with pytest.raises(EngineFailed, match=re.escape(architecture.refused)):
            answers(tmp_path, architecture, model.path, prompts, **fused)
        record["refused"] = architecture.refused
    elif every and architecture.in_fp32:
        plain = write_dequantized(tmp_path / "plain", model)
        if architecture.fails:
            with pytest.raises(EngineFailed, match=re.escape(architecture.fails)):
                answers(tmp_path, architecture, plain, prompts, dtype="float32")
            record["fails"] = architecture.fails
        else:
            # Where vLLM's model is another one, it says itself which answers are sure. Some answer
            # otherwise in another batch, or on other ranks: both engines get the same ones
            prompts = CANDIDATES if architecture.apart else prompts
            size = architecture.ranks[0] if architecture.apart else 1
            found = answers(
                *(tmp_path, architecture, plain, prompts),
                dtype="float32",
                tensor_parallel_size=size,
            )
            record["apart"] = difference(found, model.logprobs(prompts))
            assert (record["apart"] > LIMIT / 10) == architecture.apart
            expected = [each["prompt_logprobs"] for each in found]
            tokens = [each["tokens"][0] for each in found]
            if architecture.apart:
                sure = [i for i, each in enumerate(found) if each["margin"] > SURE]
                assert len(sure) >= PROMPTS
    runs = not architecture.refused and not architecture.fails
    for ranks in (architecture.ranks if every else (ALWAYS[name],)) if runs else ():
        found = answers(
            tmp_path, architecture, model.path, prompts, tensor_parallel_size=ranks, **fused
        )
        record["ranks"][ranks] = difference(found, expected)
        assert record["ranks"][ranks] <= LIMIT
        assert [found[i]["tokens"][0] for i in sure] == [tokens[i] for i in sure]
        layers = int(re.search(r"fused: (\d+)", (tmp_path / "engine.log").read_text()).group(1))
        assert record.setdefault("layers", layers) == layers
        if ranks == 1:
            assert layers == fused_layers(tmp_path, model)
    record_property("architecture", json.dumps(record))


def test_the_table_names_these_architectures_alone() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    rows = [
        line.split("|")[1].strip().removesuffix(" (*)")
        for line in text.split(TABLE)[1].splitlines()[2:]
    ]
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
