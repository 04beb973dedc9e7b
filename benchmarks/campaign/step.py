"""What a step of a campaign is."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

BENCHMARKS = Path(__file__).resolve().parent.parent
ROOT = BENCHMARKS.parent
WORK = Path(tempfile.gettempdir()) / "fusedq-gpu-day"
# Scripts that do not take all of --seconds, --out and --dry-run; modules (-m) take none.
_TAKES = {
    "plots.py": (),
    "random_checkpoint.py": (),
    **dict.fromkeys(("gate.py", "prewarm.py", "bench_launch.py", "bench_load.py"), ("dry-run",)),
}
_ALL = ("seconds", "out", "dry-run")
Verdict = Callable[[Path], list[str]]


class Place(NamedTuple):
    """The folders that a run uses: checkpoints and compiled code in `work`, results in `out`."""

    work: Path
    out: Path

    def fill(self, text: str) -> str:
        """`text` with its placeholders replaced; `{jobs}` and `{rest}` share the cores 3 to 1."""
        cores = os.cpu_count() or 1
        jobs = max(1, cores * 3 // 4)
        return text.format(work=self.work, out=self.out, jobs=jobs, rest=max(1, cores - jobs))


class Command(NamedTuple):
    """A script of the folder above or a module (-m), with arguments; `under` is a tool around it.

    A dry run adds `dry` to the arguments, to be short. `Place.fill` says what may stand in braces.
    """

    arguments: str
    under: str = ""
    dry: str = ""

    def __str__(self) -> str:
        where = "" if self.arguments.startswith("-m") else "benchmarks/"
        return f"{self.under} python {where}{self.arguments}".lstrip()

    def line(self, place: Place, seconds: float, dry_run: bool) -> list[str]:
        """What is executed; a dry run leaves out the tool and the GPU."""
        more = f" {self.dry}" if dry_run else ""
        script, *arguments = place.fill(self.arguments + more).split()
        if script == "-m":
            return [sys.executable, script, *arguments]
        line = [sys.executable, str(BENCHMARKS / script), *arguments]
        takes = _TAKES.get(script, _ALL)
        if "seconds" in takes:
            line += ["--seconds", f"{seconds:.0f}"]
        if "out" in takes:
            line += ["--out", str(place.out)]
        if dry_run:
            return [*line, "--dry-run"] if "dry-run" in takes else line
        return [*self.under.split(), *line]


class Step(NamedTuple):
    """One question that a GPU settles.

    `prediction` was written before any answer, `changes` says what the answer would change, and
    `verdict` reads the answer from the results. Commands run one after the other, each alone with
    the GPU; `together` side by side, where they only compile, start or check. `limit` is seconds.
    A campaign ends behind a `gate` that fails.
    """

    purpose: str
    commands: tuple[Command, ...]
    prediction: str = ""
    changes: str = ""
    verdict: Verdict | None = None
    limit: float = 540
    together: bool = False
    gate: bool = False
