"""`fusedq tune` as it is typed: the refusal without a GPU, and a run on one that Triton's
interpreter stands in for, its times given."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from checkpoints import write_checkpoint
from fusedq_kernels.choose import device, tuning
from fusedq_kernels.choose.device import device_by_name
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.cli import tune as command
from vllm_fusedq.cli.main import app
from vllm_fusedq.measure import candidates
from vllm_fusedq.measure.rows_file import RowsFile, tunable
from vllm_fusedq.measure.timing import summary
from vllm_fusedq.measure.tuner import Tuner
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model

H200 = device_by_name("h200")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path: Path, cache: Path) -> None:
    write_checkpoint(tmp_path)
    code, output = invoke("tune", tmp_path)
    assert code == 1
    assert "refused: fusedq tune: found no GPU that torch can use here; supported: NVIDIA" in output
    assert "run it on the machine that will serve" in output
    assert not cache.exists()


def test_without_triton_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current_gpu", lambda: (H200, 1))
    monkeypatch.setattr(tuning, "triton_version", lambda: None)
    code, output = invoke("tune", tmp_path)
    assert code == 1
    assert "found no Triton here" in output


@pytest.mark.parametrize("wrong", [("--dtype", "float32"), ("-tp", "0"), ("-tp", "two")])
def test_wrong_usage(tmp_path: Path, wrong: tuple[str, str]) -> None:
    assert invoke("tune", tmp_path, *wrong)[0] == 2


def test_what_is_asked_for_is_measured_stopped_and_gone_on_with(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, layers=2)
    monkeypatch.setattr(device, "current_gpu", lambda: (H200, 1))
    # The interpreter in the GPU's place, two steps a shape, one tile a step, times of no meaning
    monkeypatch.setattr(torch, "device", lambda kind, real=torch.device: real("cpu"))
    monkeypatch.setattr(candidates, "DECODE_BUCKETS", (8, 64))
    monkeypatch.setattr(candidates, "PREFILL_BUCKETS", ())
    steps = _steps(model)
    options = ("tune", model, "--dtype", "float16", "--keep", 1)
    code, output = invoke(*options, "--seconds", 0)
    assert code == 0
    assert f"0 rows in {RowsFile(H200, tuning.triton_version()).path}; {steps} of {steps}" in output
    code, output = invoke(*options)
    assert code == 0, output
    assert f"[1/{steps}, about " in output
    assert f"[{steps}/{steps}, about 0 s left] " in output
    assert "remain" not in output
    path = RowsFile(H200, tuning.triton_version()).path
    rows = json.loads(path.read_text())["tables"][0]["rows"]
    assert len(rows) == steps
    assert invoke(*options)[1].startswith(f"{steps} rows in ")
    tuning.forget()
    _, checked = invoke("check", model, "--device", "h200", "--dtype", "float16")
    assert "tuned: yours, row" in checked


def _steps(model: Path) -> int:
    plans = plan_model(read_checkpoint(model), Target(H200, torch.float16)).layers
    return 2 * len({(n, k) for n, k, _ in tunable(plans)})


def test_what_is_wrong_is_told(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fails(calls: object, on: torch.device) -> object:
        raise RuntimeError("out of resource")

    write_checkpoint(tmp_path)
    plans = plan_model(read_checkpoint(tmp_path), Target(H200, torch.float16)).layers
    file = RowsFile(H200, "3.9.0")
    jobs = file.left_of(list(tunable(plans))[:1], (8,))
    for measure, said in (
        (fails, "no launch is right, the rules stay"),
        (lambda calls, on: summary([7.0]), "7.0 us, 8x64 split 1"),
    ):
        tuner = Tuner(torch.device("cpu"), H200, torch.float16, 1, measure=measure)
        command.measure_all(jobs, file, tuner, None, Console(width=500))
        output = capsys.readouterr().out
        assert said in output
        assert ("FAILED: RuntimeError: out of resource" in output) == (measure is fails)


@pytest.mark.parametrize("place", ["triton-3.1/h200.json", "a100.json"])
def test_check_says_which_rows_are_not_used(tmp_path: Path, cache: Path, place: str) -> None:
    model = tmp_path / "model"
    write_checkpoint(model)
    mine = RowsFile(H200, str(tuning.triton_version())).path
    path = mine.parent.parent / place if "/" in place else mine.parent / place
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    tuning.forget()
    code, output = invoke("check", model, "--device", "h200")
    assert code == 0
    assert f"note: tuned rows: {path}: not used: measured " in output.replace(" ", " ")
