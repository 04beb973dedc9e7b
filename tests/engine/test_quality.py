"""`fusedq quality` in the real engine, against transformers in fp32 and weights unpacked here."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner, Result

from tiny_models import UNQUANTIZED, asset, reference
from vllm_fusedq.cli import app
from vllm_fusedq.errors import CheckpointError
from vllm_fusedq.measure.windows import cut, load_tokenizer, tokenize

pytestmark = pytest.mark.engine

MODEL = asset("tiny-llama-awq-g128")
BASE = asset(UNQUANTIZED)
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "quality.v1.json"
LENGTH = 40
TOP = 100


def fusedq(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quality", *arguments])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [prompt["text"] for prompt in reference(MODEL.name)["prompts"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Result, Path]:
    """One pair of engines for all: two sets, two lengths, limits of which one is exceeded."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "one.txt").write_text(texts[0])
    sets = [
        "--texts",
        f"prompts={folder / 'prompts.jsonl'}",
        "--texts",
        f"one={folder / 'one.txt'}",
    ]
    limits = ["--max-kl", "1e-9", "--max-ppl-ratio", "2", "--max-length", f"{LENGTH},500"]
    command = [str(MODEL), "--against", str(BASE), "--dtype", "float16", *sets, *limits]
    plot = folder / "quality.png"
    return fusedq(*command, "--json", "--plot", str(plot)), plot


@pytest.fixture(scope="module")
def found(run: tuple[Result, Path]) -> dict[str, Any]:
    document = json.loads(run[0].stdout)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    return document


def unpacked(path: Path) -> dict[str, torch.Tensor]:
    """AWQ's weights by its own rule, `[N, K]`: eight codes a word, in this order."""
    stored, weights = load_file(path / "model.safetensors"), {}
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            codes, zeros = (
                (packed[:, :, None] >> order & 15).flatten(1).float()
                for packed in (tensor, stored[f"{module}.qzeros"])
            )
            groups = len(codes) // len(zeros)
            scales = stored[f"{module}.scales"].float().repeat_interleave(groups, 0)
            weights[f"{module}.weight"] = (
                (codes - zeros.repeat_interleave(groups, 0)) * scales
            ).t()
        elif kind not in ("qzeros", "scales"):
            weights[name] = tensor.float()
    return weights


@pytest.fixture(scope="module")
def distributions(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scored tokens [P], and log-probabilities `[P, vocabulary]` of model and reference."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model = LlamaForCausalLM(base.config).float().eval()
    model.load_state_dict(unpacked(MODEL), strict=False)
    model.tie_weights()
    scored, logs = [], ([], [])
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), LENGTH - 1):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + LENGTH - 1]]])
            scored.append(window[0, 1:])
            for side, each in zip((model, base), logs, strict=True):
                with torch.no_grad():
                    each.append(side(window).logits[0, :-1].double().log_softmax(1))
    return torch.cat(scored), torch.cat(logs[0]), torch.cat(logs[1])


def test_the_measures_are_those_of_transformers(
    found: dict[str, Any], distributions: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    scored, q, p = distributions
    row = found["texts"][0]
    assert (row["texts"], row["max_length"], row["tokens"]) == ("prompts", LENGTH, len(scored))
    ours, theirs = (side.gather(1, scored[:, None])[:, 0] for side in (q, p))
    assert row["perplexity"] == pytest.approx((-ours.mean()).exp().item(), rel=2e-3)
    assert row["reference_perplexity"] == pytest.approx((-theirs.mean()).exp().item(), rel=2e-3)
    ratio = (theirs.mean() - ours.mean()).exp().item()
    assert row["perplexity_ratio"] == pytest.approx(ratio, abs=2e-3)
    difference = (ours - theirs).abs()
    assert row["mean_difference"] == pytest.approx(difference.mean().item(), rel=0.05)
    assert row["p99_difference"] == pytest.approx(difference.quantile(0.99).item(), rel=0.1)
    agreement = (q.argmax(1) == p.argmax(1)).double().mean().item()
    assert row["top1_agreement"] == pytest.approx(agreement, abs=0.02)
    top = p.topk(TOP, dim=1).indices
    alone, other = (side.gather(1, top).exp() for side in (p, q))
    rest, other_rest = 1 - alone.sum(1), 1 - other.sum(1)
    kl = (alone * (alone / other).log()).sum(1) + rest * (rest / other_rest).log()
    assert row["mean_kl"] == pytest.approx(kl.mean().item(), rel=0.05)
    assert row["compared"] == pytest.approx(alone.sum(1).mean().item(), abs=1e-3)


def test_every_set_and_length_has_a_row(found: dict[str, Any]) -> None:
    rows = [(row["texts"], row["max_length"]) for row in found["texts"]]
    assert rows == [("prompts", LENGTH), ("prompts", 500), ("one", LENGTH), ("one", 500)]
    assert found["model"] | {"device": ""} == {
        "model": str(MODEL),
        "quantization": "fusedq",
        "dtype": "float16",
        "device": "",
        "vllm": found["reference"]["vllm"],
    }
    assert (found["reference"]["model"], found["reference"]["quantization"]) == (str(BASE), None)


def test_limits_decide_the_exit_code(run: tuple[Result, Path], found: dict[str, Any]) -> None:
    result, plot = run
    assert result.exit_code == 1
    assert len(found["exceeded"]) == 4
    assert re.search(r"prompts, windows of 40: mean KL divergence .* exceeds 1e-09", result.stderr)
    assert "perplexity ratio" not in result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_real_tokenizer_puts_its_mark_before_each_window() -> None:
    found = tokenize(load_tokenizer(str(BASE)), "import os\nimport sys\n")
    assert found.prefix == (0,)
    assert len(found.tokens) > 3
    windows = list(cut("code", found, 4))
    assert all(window.tokens[0] == 0 for window in windows)
    assert tuple(token for window in windows for token in window.tokens[1:]) == found.tokens


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="put the tokenizer files of the original model"):
        load_tokenizer(str(tmp_path))
