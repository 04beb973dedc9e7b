"""What waits for a GPU: what settles most, and all that takes longer, in steps.

    python benchmarks/gpu_day.py                             # the steps, predictions and commands
    python benchmarks/gpu_day.py first --until 840           # what settles most, in 840 seconds
    python benchmarks/gpu_day.py sane bits --archive day.tar.gz
    python benchmarks/gpu_day.py right --dry-run             # no GPU: the same, tiny, on a CPU

Commands that only compile, start or check run side by side, what is timed runs alone. A step that
has a prediction prints it beside what was found and what that would change. A command that is not
done in its time stops by itself, and the same line goes on where it stopped, from the result files.
A failure does not keep the next step from running, but a closed gate does; the exit status is 1
then. All logs, results and tuned rows go into one archive, written again after each step. Nothing
needs a network.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from campaign.runner import Campaign, archive
from campaign.step import WORK, Place
from campaign.steps import FIRST, LONGER, STEPS
from fusedq_kernels.choose import tuning
from gemmbench.own import device_spec
from gemmbench.results import RESULTS

ALL_OF = {"first": tuple(FIRST)}

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    step: Annotated[list[str] | None, typer.Argument(help=", ".join((*ALL_OF, *STEPS)))] = None,
    until: Annotated[float, typer.Option(help="seconds for all steps together")] = 540,
    work: Annotated[Path, typer.Option(help="folder of checkpoints and logs")] = WORK,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    to: Annotated[Path | None, typer.Option("--archive", help="WORK/gpu-day.tar.gz")] = None,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU")] = False,
) -> None:
    names = [each for given in step or () for each in ALL_OF.get(given, (given,))]
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        known = ", ".join((*ALL_OF, *STEPS))
        raise typer.BadParameter(f"unknown steps {unknown}; known: {known}")
    if not names:
        print(listing())
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run takes every step on a CPU, tiny")
    results = work / "results" if dry_run else RESULTS / device_spec(device).name
    campaign = Campaign(Place(work, out or results), until, dry_run)
    path = to or work / "gpu-day.tar.gz"
    for name in names:
        report = campaign.run(name, STEPS[name])
        archive(path, campaign, tuning.FOLDER)
        if STEPS[name].gate and report.problems:
            print(f"the gate {name} is closed: no other step runs", file=sys.stderr)
            break
    print(path)
    problems = [problem for each in campaign.reports for problem in each.problems]
    for line in problems:
        print(line, file=sys.stderr)
    raise typer.Exit(bool(problems))


def listing() -> str:
    """Every step with its prediction and commands."""
    lines = []
    for title, steps in (("first:", FIRST), ("longer:", LONGER)):
        lines.append(title)
        for name, each in steps.items():
            lines.append(f"  {name}: {each.purpose}")
            lines += [f"      predicted: {each.prediction}"] * bool(each.prediction)
            lines += [f"      {command}" for command in each.commands]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
