"""`serve_compare.py`: a real engine in its dry run, and what it makes of answers and logs."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import preloaded
import serve_compare
from gemmbench import engines
from gemmbench.results import ResultFile

LOG = """
INFO [default_loader.py:502] Loading weights took 1.52 seconds
INFO [gpu_model_runner.py:5150] Model loading took 5.39 GiB memory and 2.601234 seconds
INFO [live.py:90] fusedq loading: 1.40 s, ... repacking: 0.81 s, ... warm-up: 3.25 s, ...
INFO [monitor.py:20] torch.compile took 11.20 s in total
INFO [gpu_model_runner.py:6582] Graph capturing finished in 9 secs, took 0.52 GiB
INFO [core.py:396] init engine (profile, create kv cache, warmup model) took 31.07 s (comp...
"""


def plain(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def test_metrics_are_medians_of_the_answer_and_the_log_taken_apart() -> None:
    answer = {
        "start_s": 61.234,
        "measured_s": 44.321,
        "kernels": {"MacheteLinearKernel": 128},
        "decode-8": [100.0, 130.0, 110.0],
        "prefill-512": [5000.0],
    }
    rows = engines.metrics(answer, LOG)
    assert {row["metric"]: row["value"] for row in rows} == {
        **{
            "start_s": 61.23,
            "measured_s": 44.32,
            "load_read_s": 1.52,
            "load_total_s": 2.601,
            "memory_gib": 5.39,
        },
        **{"repack_s": 0.81, "warm_up_s": 3.25},
        **{"graph_capture_s": 9.0, "compile_s": 11.2, "init_engine_s": 31.07},
        **{"decode-8_tok_s": 110.0, "prefill-512_tok_s": 5000.0},
    }
    assert {row["metric"]: row.get("spread") for row in rows}["decode-8_tok_s"] == 15.0
    assert {row["kernels"] for row in rows} == {"MacheteLinearKernel:128"}


def test_ratios_set_fusedq_beside_every_other_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ResultFile(tmp_path / "serving.csv", serve_compare.COLUMNS)
    for side, value in (("stock", 90.0), ("stock", 100.0), ("bf16", 50.0), ("fusedq", 120.0)):
        row = {"model": "m", "layout": "gptq", "metric": "decode-1_tok_s", "kernels": ""}
        file.append([{**row, "side": side, "value": value}], {})
    serve_compare.print_ratios(file)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "decode-1_tok_s" in line]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells == ["m", "gptq", "decode-1_tok_s", "120", "1.200", "", "2.400"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run", "--side", "sglang"), "unknown ['sglang']; known: stock, marlin, bf16"),
        (("--dry-run", "--layout", "exl3"), "unknown ['exl3']; known: gptq, awq, compressed-"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(serve_compare.app, arguments)
    assert done.exit_code == 2
    assert message in plain(done.output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on() -> None:
    done = CliRunner().invoke(serve_compare.app, [])
    assert done.exit_code == 2
    assert "no CUDA device here; --dry-run serves a tiny model" in plain(done.output)


WORKER = """
import json, sys, time
from pathlib import Path
sys.modules["vllm"] = type(sys)("vllm")
for name in ("LLM", "SamplingParams", "TokensPrompt"):
    setattr(sys.modules["vllm"], name, object)
sys.path.insert(0, {folder!r})
import engine_worker

request, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
turn = request["turn"]
if "dies" in turn["name"]:
    sys.exit("no such kernel")
if "slow" in turn["name"]:
    time.sleep(0.6)
with engine_worker.my_turn(folder, turn):
    others = [folder / f"{{name}}.started.json" for name in turn["together"] if "dies" not in name]
    started = all(each.exists() for each in others)
    begin = time.time()
    time.sleep(0.3)
    times = {{"start_s": begin, "measured_s": time.time(), "kernels": {{"all started": started}}}}
    engine_worker.write(folder / f"{{turn['name']}}.answer.json", times)
    if "hangs" in turn["name"]:
        time.sleep(60)
"""


def engines_of(
    names: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 30
) -> dict[str, list[dict[str, object]] | engines.EngineDied]:
    """What engines leave that only wait for their turn; their names say what else they do."""
    worker = folder / "worker.py"
    worker.write_text(WORKER.format(folder=str(engines.WORKER.parent)))
    monkeypatch.setattr(engines, "WORKER", worker)
    starts = {
        name: engines.Start(folder / "model", engines.Side(), folder / f"{name}.log")
        for name in names
    }
    return engines.run_engines(starts, {"engine": {}}, True, seconds)


def test_engines_measure_one_after_the_other_once_all_have_started_or_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engines_of(("quick", "slow", "dies"), tmp_path, monkeypatch)
    assert "no such kernel" in str(found.pop("dies"))
    spans = []
    for rows in found.values():
        values = {row["metric"]: row["value"] for row in rows}
        assert rows[0]["kernels"] == "all started:True"
        spans.append((values["start_s"], values["measured_s"]))
    (_, first_end), (second_begin, _) = sorted(spans)
    assert second_begin >= first_end - 0.02


def test_an_engine_that_hangs_is_ended_with_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engines_of(("hangs",), tmp_path, monkeypatch, seconds=4)
    assert found["hangs"][0]["metric"] == "start_s"


@pytest.mark.engine
def test_a_dry_run_serves_side_by_side_names_the_kernels_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other tests start their workers in processes that import everything themselves.
    monkeypatch.setattr(engines, "run_worker", preloaded.start)
    sides = ["--side", "fusedq", "--side", "bf16", "--together"]
    arguments = ["--dry-run", *sides, "--out", str(tmp_path), "--work"]
    done = CliRunner().invoke(serve_compare.app, [*arguments, str(tmp_path / "work")])
    assert done.exit_code == 0, done.output
    rows = ResultFile(tmp_path / "serving.csv", serve_compare.COLUMNS).rows()
    assert {row["side"] for row in rows if row["metric"] == "decode-2_tok_s"} == {"fusedq", "bf16"}
    rows = [row for row in rows if row["side"] == "fusedq"]
    values = {row["metric"]: float(row["value"]) for row in rows}
    assert {"decode-1_tok_s", "decode-2_tok_s", "prefill-16_tok_s", "load_read_s"} <= set(values)
    # A rate is of the difference of two times, which on a busy machine may be negative
    timed = {name for name, value in values.items() if value}
    # Neither repacking a tiny model nor warming up a CPU takes a hundredth of a second
    assert set(values) - timed <= {"repack_s", "warm_up_s"}
    # Two blocks of four fused layers.
    assert all("cpu-fused:8" in row["kernels"] for row in rows)
    again = CliRunner().invoke(serve_compare.app, [*arguments, str(tmp_path / "work")])
    assert again.exit_code == 0
    assert "[1/" not in again.output
