"""Runs steps within a time budget and keeps everything that they left in one archive."""

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from campaign.step import ROOT, Command, Place, Step

# What a command may take beyond its own limit: the compilation or engine that it is in.
GRACE_SECONDS = 30
# With less than this no command begins.
MIN_SECONDS = 15
_SHOWN_LINES = 5


class Outcome(NamedTuple):
    """One command: its log, seconds, and what went wrong or None."""

    command: str
    log: str
    seconds: float
    problem: str | None


class Report(NamedTuple):
    """A step, its commands and what the results say."""

    step: str
    outcomes: list[Outcome]
    prediction: str
    found: list[str]
    changes: str

    @property
    def problems(self) -> list[str]:
        return [f"{self.step}: {each.problem}" for each in self.outcomes if each.problem]


class Campaign:
    """The steps of one run; `until` is seconds from now, when the last command is to have ended."""

    def __init__(self, place: Place, until: float, dry_run: bool = False) -> None:
        self.place, self.dry_run = place, dry_run
        self._end = time.monotonic() + until
        self.logs = place.work / "logs"
        self.reports: list[Report] = []
        for folder in (self.logs, place.out):
            folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self._end - time.monotonic()

    def run(self, name: str, step: Step) -> Report:
        """All commands of a step; prints the ends of their logs and what the results say."""
        print(f"=== {name}: {step.purpose}", flush=True)
        groups = [step.commands] if step.together else [(each,) for each in step.commands]
        outcomes, begin = [], time.monotonic()
        for group in groups:
            left = min(step.limit - (time.monotonic() - begin), self.left())
            outcomes += self._side_by_side(name, group, left, len(outcomes))
        found = step.verdict(self.place.out) if step.verdict else []
        report = Report(name, outcomes, step.prediction, found, step.changes)
        self.reports.append(report)
        print(described(report), flush=True)
        return report

    def _side_by_side(
        self, name: str, commands: Sequence[Command], seconds: float, first: int
    ) -> list[Outcome]:
        if seconds < MIN_SECONDS:
            return [
                Outcome(str(each), "", 0, f"no time left for {each.arguments}: run it again")
                for each in commands
            ]
        running = [
            _Running(each, self, self.logs / f"{name}-{number}.log", seconds)
            for number, each in enumerate(commands, first)
        ]
        limit = min(seconds + GRACE_SECONDS, max(self.left(), MIN_SECONDS))
        return [each.wait(limit) for each in running]


class _Running:
    """A started command in a session of its own: its workers end with it."""

    def __init__(self, command: Command, campaign: Campaign, log: Path, seconds: float) -> None:
        self.command, self.log, self.begin = command, log, time.monotonic()
        line = command.line(campaign.place, seconds, campaign.dry_run)
        print(f"--- {' '.join(line)}", flush=True)
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        if command.under:
            # The sanitizer sees an allocation's border only where nothing caches allocations.
            env |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.process: subprocess.Popen[bytes] | None = None
        self.missing = ""
        with log.open("w") as output:
            try:
                self.process = subprocess.Popen(
                    line,
                    cwd=ROOT,
                    env=env,
                    start_new_session=True,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            except FileNotFoundError as error:
                self.missing = f"{error.filename} is not installed"

    def wait(self, limit: float) -> Outcome:
        """Its end, `limit` seconds after its beginning at the latest."""
        problem = self.missing or self._problem(limit)
        seconds = time.monotonic() - self.begin
        lines = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
        print(f"{self.log.name}, {seconds:.0f} s, {problem or 'done'}", flush=True)
        print("\n".join(f"    {text[:200]}" for text in lines[-_SHOWN_LINES:]), flush=True)
        return Outcome(str(self.command), self.log.name, round(seconds, 1), problem)

    def _problem(self, limit: float) -> str | None:
        assert self.process is not None
        try:
            status = self.process.wait(max(0, limit - (time.monotonic() - self.begin)))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return f"{self.command.arguments} was stopped after {limit:.0f} s: run it again"
        return f"{self.command.arguments}: exit status {status}" if status else None


def described(report: Report) -> str:
    """The prediction, what was found, and what that would change."""
    cells = {
        "predicted": [report.prediction],
        "found": report.found,
        "would change": [report.changes],
    }
    return "\n".join(f"{name}: {text}" for name, texts in cells.items() for text in texts if text)


def archive(path: Path, campaign: Campaign, tuned: Path) -> None:
    """Logs, results, tuned rows and an index of all that ran, as one .tar.gz; replaces the last."""
    index = [
        {**each._asdict(), "outcomes": [o._asdict() for o in each.outcomes]}
        for each in campaign.reports
    ]
    text = campaign.place.work / "index.json"
    text.write_text(json.dumps(index, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    members = {
        "index.json": text,
        "logs": campaign.logs,
        "results": campaign.place.out,
        "tuned": tuned,
    }
    with tarfile.open(partial, "w:gz") as file:
        for name, source in members.items():
            if source.exists():
                file.add(source, f"{path.name.split('.')[0]}/{name}")
    partial.replace(path)
