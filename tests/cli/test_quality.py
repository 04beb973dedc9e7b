"""`fusedq quality`: what is refused before an engine starts, limits, tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tiny_models import MIXTURE, UNQUANTIZED, asset
from vllm_fusedq.cli import app
from vllm_fusedq.cli.output import writing_file
from vllm_fusedq.errors import CheckpointError, OutputError
from vllm_fusedq.measure import extras
from vllm_fusedq.measure.metrics import Distance
from vllm_fusedq.measure.quality import (
    MAX_LENGTH,
    Engine,
    Measured,
    Quality,
    Side,
    engine_arguments,
    lengths_for,
    sides,
)
from vllm_fusedq.measure.quality_report import Limits, cells, quality_json, tasks_table
from vllm_fusedq.measure.tasks import TaskScore
from vllm_fusedq.report.table import render

MODEL, BASE = str(asset("tiny-llama-awq-g128")), str(asset(UNQUANTIZED))


def fusedq(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quality", *arguments])


def one_line(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--against'"),
        (("--against", BASE, "--texts", "german"), "'german' is neither NAME=FILE nor one of"),
        (("--against", BASE, "--texts", "=a.txt"), "'=a.txt' is neither NAME=FILE nor one of"),
        (("--against", BASE, "--texts", "a="), "'a=' is neither NAME=FILE nor one of"),
        (
            ("--against", BASE, "--texts", "python", "--texts", "python"),
            "--texts names 'python' twice",
        ),
        (("--against", BASE, "--max-length", "1"), "--max-length start at 2"),
        (("--against", BASE, "--max-length", "long"), "is not a list of numbers"),
        (("--against", BASE, "--max-kl", "-1"), "max-kl"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = fusedq(MODEL, *arguments)
    assert result.exit_code == 2
    assert message in one_line(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BASE, "--against", "stock"), f"{UNQUANTIZED} is not quantized: there is nothing"),
        (
            (MODEL, "--against", str(asset(MIXTURE))),
            "a vocabulary of 512 tokens and .* one of 128 ; a comparison needs the model",
        ),
        ((MODEL, "--against", "no/where/at/all"), "not a local directory"),
        ((MODEL, "--against", BASE, "--texts", "law=no.txt"), "texts 'law': no.txt cannot be read"),
    ],
)
def test_refusals_before_an_engine_starts(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = fusedq(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: ")
    for part in message.split(" .* "):
        assert part.replace(" ;", ";") in result.stderr


def test_a_quantization_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["bits"] = 9
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = fusedq(str(tmp_path / "model"), "--against", BASE)
    assert result.exit_code == 1
    assert "bits" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (("--tasks", "piqa"), "lm_eval", "tasks"),
        (("--plot", "q.png"), "matplotlib", "bench"),
    ],
)
def test_a_missing_extra_is_named(
    arguments: tuple[str, ...], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    result = fusedq(MODEL, "--against", BASE, *arguments)
    assert result.exit_code == 1
    option = arguments[0]
    assert f"{option} needs {module}, which is not installed" in result.stderr
    assert f"pip install 'vllm-fusedq[{extra}]'" in result.stderr


def test_a_plot_that_cannot_be_written_is_exit_code_3(tmp_path: Path) -> None:
    for plot in (tmp_path, tmp_path / "nowhere" / "q.png"):
        result = fusedq(MODEL, "--against", BASE, "--plot", str(plot))
        assert result.exit_code == 3
        assert f"{plot} cannot be written: name a file in a directory" in result.stderr


def test_a_disk_that_is_full_after_all_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"q\.png cannot be written: No space left"),
        writing_file(tmp_path / "q.png"),
    ):
        raise OSError(28, "No space left on device")


def test_how_each_side_is_served() -> None:
    ours, theirs = sides(MODEL, BASE, settings={"kernel": "cpu-striped", "activations": "16-bit"})
    assert (ours.quantization, ours.name) == ("fusedq", f"{MODEL} (fusedq)")
    assert engine_arguments(ours, Engine())["additional_config"] == {
        "fusedq": {"kernel": "cpu-striped", "activations": "16-bit"}
    }
    assert "additional_config" not in engine_arguments(theirs, Engine())
    assert (theirs.quantization, theirs.name) == (None, f"{BASE} (vLLM)")
    stock = sides(MODEL, "stock", revision="main")[1]
    assert stock == Side(MODEL, "stock vLLM", None, "main")
    other = str(asset("tiny-llama-gptq-g128"))
    given = {"kernel": "cpu-striped", "activations": "16-bit"}
    kept = {"activations": "16-bit"}
    assert sides(MODEL, other, None, given)[1] == Side(other, "fusedq", "fusedq", None, kept)


def test_windows_leave_room_for_the_token_that_the_engine_wants(tmp_path: Path) -> None:
    assert lengths_for(sides(MODEL, BASE), []) == [511]
    assert lengths_for(sides(MODEL, BASE), [128, 64, 128]) == [64, 128]
    for name, length in (("long", 131072), ("untold", None)):
        (tmp_path / name).mkdir()
        config = {"max_position_embeddings": length} if length else {}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        side = Side(str(tmp_path / name), "vLLM", None)
        assert lengths_for([side], []) == [MAX_LENGTH]
    with pytest.raises(CheckpointError):
        lengths_for([Side(str(tmp_path), "vLLM", None)], [])


def quality_of(**values: float) -> Quality:
    numbers = dict.fromkeys(
        (
            *("reference_perplexity", "perplexity", "perplexity_ratio", "mean_difference"),
            *("p99_difference", "top1_agreement", "mean_kl", "p99_kl", "compared"),
        ),
        1.0,
    )
    by_token = {"differences": np.ones(7), "divergences": np.ones(7)}
    distance = Distance(tokens=7, **(numbers | values), **by_token)
    both = Side("m", "fusedq", "fusedq"), Side("b", "vLLM", None)
    served = {"dtype": "bfloat16", "device": "cpu", "vllm": "0.32.0"}
    measured = Measured("law", 512, 1, np.arange(1, 8), distance)
    return Quality(*both, {side.name: served for side in both}, (measured,))


@pytest.mark.parametrize(
    ("limits", "values", "sentences"),
    [
        (Limits(), {"mean_kl": np.inf}, []),
        (Limits(max_kl=0.5), {"mean_kl": 0.5}, []),
        (
            Limits(max_kl=0.5),
            {"mean_kl": 0.75},
            ["law, windows of 512: mean KL divergence 0.75 exceeds 0.5"],
        ),
        (
            Limits(0.5, 1.01),
            {"mean_kl": 0.1, "perplexity_ratio": 1.02},
            ["law, windows of 512: perplexity ratio 1.02 exceeds 1.01"],
        ),
        (
            Limits(max_kl=0.5),
            {"mean_kl": np.nan},
            ["law, windows of 512: mean KL divergence nan exceeds 0.5"],
        ),
    ],
)
def test_limits(limits: Limits, values: dict[str, float], sentences: list[str]) -> None:
    assert limits.exceeded(quality_of(**values)) == sentences


def test_json_has_no_infinity() -> None:
    found = quality_json(quality_of(perplexity=np.inf, mean_kl=np.nan), [], [])
    (row,) = found["texts"]
    assert (row["perplexity"], row["mean_kl"], row["p99_kl"]) == (None, None, 1.0)
    assert "Infinity" not in json.dumps(found, allow_nan=False)


def test_rows_as_people_read_them() -> None:
    found = quality_of(perplexity=12.345678, top1_agreement=0.9876, mean_kl=0.00123456)
    row = cells(found.measured[0])
    assert row[:4] == ("law", "512", "7", "12.35")
    assert row[8:10] == ("98.8 %", "0.001235")


def test_tasks_beside_each_other() -> None:
    score = TaskScore(
        "piqa", "acc", reference=0.8, model=0.75, reference_error=0.01, model_error=None
    )
    line = next(line for line in render(tasks_table([score])).splitlines() if "piqa" in line)
    assert line.split() == ["piqa", "acc", "0.7500", "0.8000", "±", "0.0100", "-0.0500"]
