"""The day on a GPU: every command of it is one that its script understands."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import gpu_day
from gemmbench.experiments import EXPERIMENTS

README = (gpu_day.BENCHMARKS / "README.md").read_text()
COMMANDS = [command for step in gpu_day.STEPS.values() for command in step.commands]
IN_README = re.findall(r"python benchmarks/(\w+\.py[^\n`|]*)", README)


def options_of(line: str) -> dict[str, object]:
    """A command's parameters as its script parses them; raises for one that it does not know."""
    script, *arguments = shlex.split(line.split(" # ")[0].replace("$WORK", "work"))
    if script == "-m":
        return {"files": [name for name in arguments if name.startswith("tests/")]}
    if script == "plots.py":
        pytest.importorskip("matplotlib")
    command = typer.main.get_command(import_module(script.removesuffix(".py")).app)
    return command.make_context(script, arguments, resilient_parsing=False).params


@pytest.mark.parametrize("line", sorted({*IN_README, *(each.arguments for each in COMMANDS)}))
def test_every_command_is_understood(line: str) -> None:
    assert options_of(line)
    for file in re.findall(r"tests/[\w./-]+", line):
        assert (gpu_day.ROOT / file).exists()


def test_every_experiment_is_a_step_and_in_the_readme() -> None:
    numbers = [options_of(c.arguments).get("number") or () for c in COMMANDS]
    assert sorted(n for some in numbers for n in some) == sorted(EXPERIMENTS)
    for number, each in EXPERIMENTS.items():
        row = (number, each.title, each.prediction, each.refuted_by)
        assert f"| {' | '.join(map(str, row))} |\n" in README
    for step in gpu_day.STEPS:
        assert f"`{step}`" in README


def test_a_dry_run_is_the_same_command_without_tool_and_gpu() -> None:
    memcheck = gpu_day.STEPS["sane"].commands[0]
    real = gpu_day.full_command(memcheck, 100, dry_run=False)
    assert real[:2] == ["compute-sanitizer", "--error-exitcode"]
    dry = gpu_day.full_command(memcheck, 100, dry_run=True)
    assert dry[:2] == [sys.executable, str(gpu_day.BENCHMARKS / "kernels_correct.py")]
    assert dry[-3:] == ["--seconds", "100", "--dry-run"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.arguments)
def test_what_is_limited_and_dry_run_is_understood(command: gpu_day.Command) -> None:
    line = gpu_day.full_command(command, 77, dry_run=True)
    params = options_of(shlex.join([Path(line[1]).name, *line[2:]]))
    assert "{" not in " ".join(line)
    if "--seconds" in line:
        assert params["seconds"] == 77
        assert params["dry_run"]


def test_a_step_runs_and_its_results_are_kept(tmp_path: Path) -> None:
    """`predict` needs no GPU: the command as a user gives it."""
    done = subprocess.run(
        [sys.executable, gpu_day.__file__, "predict", "--dry-run", "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "static roofline, h200" in done.stdout
    assert (tmp_path / "benchmarks" / "results" / "cpu" / "README.md").exists()
    assert list((tmp_path / "kernels" / "fusedq_kernels" / "tuned").iterdir())


def test_what_fails_is_named_and_the_rest_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    steps = {
        "missing": gpu_day.Step("", (gpu_day.Command("bench_gemm.py --roofline", "no-such-tool"),)),
        "wrong": gpu_day.Step("", (gpu_day.Command("bench_gemm.py --shapes llama-9"),)),
    }
    problems = {name: gpu_day.run(s.commands[0], 60, dry_run=False) for name, s in steps.items()}
    assert problems == {
        "missing": "no-such-tool is not installed",
        "wrong": "bench_gemm.py --shapes llama-9: exit status 2",
    }
    assert "--- no-such-tool" in capfd.readouterr().out
    killed = gpu_day.run(steps["wrong"].commands[0], 0.01 - gpu_day.GRACE_SECONDS, dry_run=False)
    assert killed == "bench_gemm.py --shapes llama-9 was stopped after 0 s: run it again"


def test_a_day_without_time_and_unknown_steps() -> None:
    done = CliRunner().invoke(gpu_day.app, ["bits", "tune", "--seconds", "0"])
    assert done.exit_code == 1
    assert "bits: no time left for experiments.py 3 5: run it again" in done.output
    assert "tune: no time left for tune.py" in done.output
    done = CliRunner().invoke(gpu_day.app, ["dance"])
    assert done.exit_code == 2
    assert "unknown steps ['dance']; known: predict, sane" in " ".join(done.output.split())
    done = CliRunner().invoke(gpu_day.app, [])
    assert done.exit_code == 0
    assert "    python benchmarks/experiments.py 3 5\n" in done.output
