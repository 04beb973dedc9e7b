"""The campaign: every command is one that its script understands, and what a run leaves behind."""

import json
import re
import shlex
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import gpu_day
from campaign import runner, verdicts
from campaign.runner import Campaign
from campaign.step import BENCHMARKS, ROOT, Command, Place, Step
from campaign.steps import FIRST, STEPS
from gemmbench.experiments import EXPERIMENTS
from gemmbench.results import ResultFile

README = (BENCHMARKS / "README.md").read_text()
COMMANDS = [command for step in STEPS.values() for command in step.commands]
IN_README = re.findall(r"python benchmarks/(\w+\.py[^\n`|]*)", README)


def options_of(line: str) -> dict[str, object]:
    """A command's parameters as its script parses them; raises for one that it does not know."""
    script, *arguments = shlex.split(line.split(" # ")[0].replace("$WORK", "work"))
    if script == "-m":
        return {"files": [name for name in arguments if name.startswith("tests/")]}
    if script == "plots.py":
        pytest.importorskip("matplotlib")
    if script == "bench_launch.py":
        # Importing it puts Triton's interpreter aside; its own test runs it.
        return {"arguments": arguments}
    command = typer.main.get_command(import_module(script.removesuffix(".py")).app)
    return command.make_context(script, arguments, resilient_parsing=False).params


def place_in(folder: Path) -> Place:
    return Place(folder, folder / "results")


def script(folder: Path, text: str) -> Command:
    """A command that is a script of one's own."""
    file = folder / f"{abs(hash(text))}.py"
    file.write_text(text)
    return Command(f"{file} --given")


@pytest.fixture
def own_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that take no options of a campaign; an absolute path stays one behind BENCHMARKS."""
    monkeypatch.setattr("campaign.step._ALL", ())


def test_every_command_is_understood(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    for line in sorted({*IN_README, *(place.fill(each.arguments) for each in COMMANDS)}):
        assert options_of(line), line
        for file in re.findall(r"tests/[\w./-]+", line):
            assert (ROOT / file).exists()


def test_every_experiment_is_a_step_and_in_the_readme(tmp_path: Path) -> None:
    lines = [place_in(tmp_path).fill(c.arguments) for c in COMMANDS if "experiments" in c.arguments]
    numbers = [options_of(line)["number"] for line in lines]
    assert sorted(n for some in numbers for n in some) == sorted(EXPERIMENTS)
    for number, each in EXPERIMENTS.items():
        row = (number, each.title, each.prediction, each.refuted_by)
        assert f"| {' | '.join(map(str, row))} |\n" in README
    for step in STEPS:
        assert f"`{step}`" in README


def test_the_first_steps_predict_before_they_measure() -> None:
    for name, step in FIRST.items():
        assert step.prediction, name
        assert step.changes, name
        assert any(each.isdigit() for each in step.prediction), name
        assert step.gate or step.verdict, name
    assert next(iter(FIRST.values())).gate


def test_a_dry_run_is_the_same_command_without_tool_and_gpu(tmp_path: Path) -> None:
    memcheck, place = STEPS["sane"].commands[0], place_in(tmp_path)
    real = memcheck.line(place, 100, dry_run=False)
    assert real[:2] == ["compute-sanitizer", "--error-exitcode"]
    dry = memcheck.line(place, 100, dry_run=True)
    assert dry[:2] == [sys.executable, str(BENCHMARKS / "kernels_correct.py")]
    assert dry[-5:] == ["--seconds", "100", "--out", str(place.out), "--dry-run"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.arguments)
def test_what_is_limited_and_dry_run_is_understood(command: Command, tmp_path: Path) -> None:
    line = command.line(place_in(tmp_path), 77, dry_run=True)
    params = options_of(shlex.join([Path(line[1]).name, *line[2:]]))
    assert "{" not in " ".join(line)
    if "--seconds" in line:
        assert params["seconds"] == 77
        assert params["dry_run"]


def test_the_first_steps_in_a_dry_run_leave_one_archive(tmp_path: Path) -> None:
    """All of it but what imports vLLM: `test_serve_compare.py` and `test_bench_gemm.py` do."""
    names = [name for name in FIRST if not name.startswith(("serve-", "compare"))]
    arguments = [*names, "--dry-run", "--work", str(tmp_path), "--until", "600"]
    done = CliRunner().invoke(gpu_day.app, arguments)
    assert done.exit_code == 0, done.output
    with tarfile.open(tmp_path / "gpu-day.tar.gz") as file:
        members = set(file.getnames())
        index = json.load(file.extractfile("gpu-day/index.json"))
    assert [each["step"] for each in index] == names
    assert {each["problem"] for step in index for each in step["outcomes"]} == {None}
    for result in ("correct", "experiment-9", "experiment-10", "launch", "load"):
        assert f"gpu-day/results/{result}.csv" in members
    assert {"gpu-day/tuned/h200.json", "gpu-day/logs/right-0.log"} <= members
    found = {each["step"]: each["found"] for each in index}
    assert re.match(r"\d+ of \d+ checks of \d+ cases passed$", found["right"][0])
    assert all("times the rules' speed" in line for line in found["tiles"])
    assert found.pop("gate") == []
    assert all(found.values())
    for name in names:
        assert f"predicted: {STEPS[name].prediction}\n" in done.output
        assert f"would change: {STEPS[name].changes}\n" in done.output


@pytest.mark.usefixtures("own_scripts")
def test_side_by_side_is_what_is_together_and_nothing_else(tmp_path: Path) -> None:
    text = "import time; start = time.time(); time.sleep(1); print(start, time.time())"
    commands = tuple(script(tmp_path, f"{text} # {number}") for number in range(2))
    for together in (True, False):
        campaign = Campaign(place_in(tmp_path), 60)
        campaign.run("both", Step("", commands, together=together))
        logs = [(campaign.logs / f"both-{number}.log").read_text() for number in range(2)]
        (_, first_end), (second_begin, _) = (map(float, log.split()) for log in logs)
        assert (second_begin < first_end) is together


@pytest.mark.usefixtures("own_scripts")
def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    commands = (
        Command("bench_gemm.py", "no-such-tool"),
        script(tmp_path, "raise SystemExit(3)"),
        script(tmp_path, "print('fine')"),
    )
    campaign = Campaign(place_in(tmp_path), 60)
    report = campaign.run("mixed", Step("", commands))
    assert report.problems == [
        "mixed: no-such-tool is not installed",
        f"mixed: {commands[1].arguments}: exit status 3",
    ]


@pytest.mark.usefixtures("own_scripts")
def test_what_takes_too_long_is_stopped_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MIN_SECONDS", 0)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0)
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    campaign = Campaign(place_in(tmp_path), 60)
    report = campaign.run("long", Step("", (script(tmp_path, text),), limit=1))
    (problem,) = report.problems
    assert problem.endswith("was stopped after 1 s: run it again")
    assert not late.exists()
    none_left = Campaign(place_in(tmp_path), -1).run("none", Step("", (script(tmp_path, ""),)))
    assert "no time left" in none_left.problems[0]


@pytest.mark.usefixtures("own_scripts")
def test_behind_a_closed_gate_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {
        "gate": Step("", (script(tmp_path, "raise SystemExit(1)"),), gate=True),
        "later": Step("", (script(tmp_path, "print('here')"),)),
    }
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    arguments = ["gate", "later", "--dry-run", "--work", str(tmp_path)]
    done = CliRunner().invoke(gpu_day.app, arguments)
    assert done.exit_code == 1
    assert "the gate gate is closed: no other step runs" in done.output
    assert "=== later" not in done.output
    assert (tmp_path / "gpu-day.tar.gz").exists()
    done = CliRunner().invoke(gpu_day.app, [*arguments, "--until", "0"])
    assert "gate: no time left for" in done.output


def test_the_gate_closes_for_a_wrong_kernel_and_for_a_slow_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gate

    monkeypatch.setattr(gate, "WEIGHT_TYPES", gate.WEIGHT_TYPES[:1])
    monkeypatch.setattr(gate, "DRY_TOKENS", (1,))
    monkeypatch.setattr(gate, "START", time.monotonic())
    assert CliRunner().invoke(gate.app, ["--dry-run"]).exit_code == 0
    slow = CliRunner().invoke(gate.app, ["--dry-run", "--within", "0"])
    assert slow.exit_code == 1
    assert "SLOW: the first kernel took" in slow.output
    right = gate.exactness.Subject.run
    monkeypatch.setattr(gate.exactness.Subject, "run", lambda *given: 2 * right(*given))
    wrong = CliRunner().invoke(gate.app, ["--dry-run"])
    assert wrong.exit_code == 1
    assert "uint4b8: WRONG M=1" in wrong.output


def test_verdicts_name_what_is_faster_slower_and_wrong(tmp_path: Path) -> None:
    tiles = ResultFile(tmp_path / "experiment-9.csv")
    problem = {"weight_type": "uint4b8", "group_size": 128, "n": 1, "k": 2}
    times = {"fusedq": 20.0, "wide": 10.0, "narrow": 19.9, "cublas": 5.0, "broken": ""}
    for m, scale in ((512, 1), (2048, 4)):
        rows = [{**problem, "m": m, "kernel": name, "us": us} for name, us in times.items()]
        if m == 2048:
            rows = [row for row in rows if row["kernel"] != "wide"]
        tiles.append([row | {"us": row["us"] and row["us"] * scale} for row in rows], {})
    assert verdicts.variants(tmp_path, 9) == [
        "512 tokens: wide 2.00 times the rules' speed; cublas 4.00: change the rule",
        "2048 tokens: narrow 1.01 times the rules' speed; cublas 4.00: keep the rule",
    ]
    checks = ResultFile(tmp_path / "correct.csv", ("run", "case", "check", "passed", "found"))
    row = {"case": "a", "check": "right", "found": "RMS 1"}
    checks.append([row | {"passed": "no"}, row | {"case": "b", "passed": "yes"}], {})
    assert verdicts.checks(tmp_path) == ["1 of 2 checks of 2 cases passed", "WRONG a, right: RMS 1"]
    checks.append([row | {"passed": "yes"}], {})
    assert verdicts.checks(tmp_path) == ["2 of 2 checks of 2 cases passed"]
    served = ("run", "model", "layout", "side", "metric", "value")
    cell = {"model": "m", "layout": "awq"}
    ResultFile(tmp_path / "serving.csv", served).append(
        [
            cell | {"side": side, "metric": metric, "value": value}
            for side, metric, value in (
                ("stock", "decode-1_tok_s", 100),
                ("fusedq", "decode-1_tok_s", 150),
                ("stock", "prefill-512_tok_s", 100),
                ("fusedq", "prefill-512_tok_s", 40),
                ("fusedq", "repack_s", 4.2),
            )
        ],
        {},
    )
    assert verdicts.serving(tmp_path) == [
        "m awq decode-1_tok_s: 1.50 of stock",
        "m awq prefill-512_tok_s: 0.40 of stock SLOWER",
        "m awq repack_s: 4.2",
    ]


def test_without_steps_it_lists_them_and_unknown_ones_are_named() -> None:
    done = CliRunner().invoke(gpu_day.app, [])
    assert done.exit_code == 0
    assert "      python benchmarks/experiments.py 3 5\n" in done.output
    done = CliRunner().invoke(gpu_day.app, ["dance"])
    assert done.exit_code == 2
    plain = " ".join(done.output.replace("│", " ").split())
    assert "unknown steps ['dance']; known: first, gate, right" in plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu_day", "--dry-run takes every step on a CPU, tiny"),
        ("gate", "--dry-run checks in the interpreter"),
        ("prewarm", "--dry-run runs one in the interpreter"),
    ],
)
def test_without_a_gpu_it_says_how_to_go_on(name: str, message: str) -> None:
    arguments = ["first"] if name == "gpu_day" else []
    done = CliRunner().invoke(import_module(name).app, arguments)
    assert done.exit_code == 2
    assert f"no CUDA device here; {message}" in " ".join(done.output.replace("│", " ").split())
