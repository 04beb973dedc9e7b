"""What results say, in a line each: the answer that a prediction is held against.

Every function takes the folder of the results and returns nothing where there are none yet.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from gemmbench.results import ResultFile

# Microseconds by problem.
Times = dict[tuple[str, ...], float]

_OURS = "fusedq"
# A variant that is this much faster than what the rules choose is worth a change of them.
_WORTH = 1.03
# What is measured beside the variants of an experiment, not one of them.
_YARDSTICKS = ("load-only", "cublas", "without-dequant", "dequant-twice", "machete", "marlin")


def checks(folder: Path) -> list[str]:
    """How many checks of `kernels_correct.py` passed, and those that did not."""
    rows = ResultFile(folder / "correct.csv").rows()
    # Of a case that ran again the last row counts.
    last = {(row["case"], row["check"]): row for row in rows}
    failed = [f"WRONG {r['case']}, {r['check']}: {r['found']}" for r in _failed(last.values())]
    cases = len({case for case, _ in last})
    return [f"{len(last) - len(failed)} of {len(last)} checks of {cases} cases passed", *failed]


def _failed(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["passed"] != "yes"]


def variants(folder: Path, number: int) -> list[str]:
    """For each number of tokens the fastest variant of an experiment beside the rules' choice."""
    times: dict[int, dict[str, Times]] = defaultdict(dict)
    for row in ResultFile(folder / f"experiment-{number}.csv").rows():
        if row["us"]:
            problem = tuple(row[name] for name in ("weight_type", "group_size", "n", "k"))
            times[int(row["m"])].setdefault(row["kernel"], {})[problem] = float(row["us"])
    return [_fastest(m, kernels) for m, kernels in sorted(times.items())]


def _fastest(m: int, kernels: dict[str, Times]) -> str:
    rules = kernels.get(_OURS, {})
    speeds = {
        name: speed
        for name, times in kernels.items()
        if name != _OURS and (speed := _speed(rules, times)) is not None
    }
    own = {name: speed for name, speed in speeds.items() if name not in _YARDSTICKS}
    if not own:
        return f"{m} tokens: nothing to compare"
    best = max(own, key=own.__getitem__)
    verdict = "change the rule" if own[best] >= _WORTH else "keep the rule"
    others = ", ".join(f"{name} {speeds[name]:.2f}" for name in _YARDSTICKS if name in speeds)
    beside = f"; {others}" if others else ""
    return f"{m} tokens: {best} {own[best]:.2f} times the rules' speed{beside}: {verdict}"


def _speed(ours: Times, theirs: Times) -> float | None:
    """Geometric mean of how much faster the other is, over what both ran."""
    both = [ours[problem] / theirs[problem] for problem in ours if theirs.get(problem)]
    return math.exp(sum(map(math.log, both)) / len(both)) if both else None


def kernels(folder: Path) -> list[str]:
    """For each number of tokens our speed over each other kernel of `bench_gemm.py`."""
    times: dict[tuple[str, int], dict[str, Times]] = defaultdict(dict)
    for phase in ("decode", "prefill"):
        for row in ResultFile(folder / f"gemm_{phase}.csv").rows():
            if row["us"]:
                key = (row["weight_type"], int(row["m"]))
                problem = tuple(row[name] for name in ("act_dtype", "group_size", "n", "k"))
                times[key].setdefault(row["kernel"], {})[problem] = float(row["us"])
    lines = []
    for (weight_type, m), by_kernel in sorted(times.items()):
        ours = by_kernel.pop(_OURS, {})
        speeds = {name: _speed(theirs, ours) for name, theirs in by_kernel.items()}
        cells = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items() if speed)
        lines.append(f"{weight_type}, {m} tokens: speed over {cells}")
    return lines


def serving(folder: Path) -> list[str]:
    """For each model and layout the speed over stock by metric; below 1 it is said in capitals."""
    file = ResultFile(folder / "serving.csv")
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for row in file.rows():
        metrics = found[row["model"], row["layout"]].setdefault(row["side"], {})
        metrics[row["metric"]] = float(row["value"])
    lines = []
    for (model, layout), sides in found.items():
        ours, stock = sides.get(_OURS, {}), sides.get("stock", {})
        for metric in (name for name in ours if name.endswith("_tok_s") and stock.get(name)):
            ratio = ours[metric] / stock[metric]
            note = "" if ratio >= 1 else " SLOWER"
            lines.append(f"{model} {layout} {metric}: {ratio:.2f} of stock{note}")
        for metric in (name for name in ours if name.endswith("_s") and name not in stock):
            if not metric.endswith("_tok_s"):
                lines.append(f"{model} {layout} {metric}: {ours[metric]:g}")
    return lines


def launches(folder: Path) -> list[str]:
    """Microseconds of a layer call by part, the median over numbers of tokens."""
    parts: dict[str, list[float]] = defaultdict(list)
    for row in _table(folder / "launch.csv"):
        parts[row["part"]].append(float(row["us"]))
    return [f"{part}: {sorted(us)[len(us) // 2]:.1f} us" for part, us in parts.items()]


def loading(folder: Path) -> list[str]:
    """Slowest and fastest format of `bench_load.py`."""
    rows = sorted(_table(folder / "load.csv"), key=lambda row: float(row["mb_per_s"]))
    ends = rows[:1] + rows[-1:] if len(rows) > 1 else rows
    return [f"{row['format']}: {row['mb_per_s']} MB/s" for row in ends]


def _table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
