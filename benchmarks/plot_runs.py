"""One figure of kernels and one of serving: stock beside us as it was, and beside us with changes.

    python benchmarks/plot_runs.py benchmarks/results/h200

reads the CSV and JSON files there and writes kernels.png and serving.png beside them. A ratio is
taken within one run wherever that run measured both sides; the labels say where it did not.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gemmbench import measured
from gemmbench.results import ResultFile

RUN_1, RUN_2 = "run 1, as it was", "run 2, experimental kernel"
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
# label: color, line style, kernel of gemm_*.csv
STOCK = {
    "Marlin": ("#1f77b4", "-", "marlin"),
    "Machete": ("#17becf", "-", "machete"),
}
OURS, CHANGED, SLICED = "#f4a6a6", "#d62728", "#8b1a1a"
Times = dict[tuple[int, int, int], float]

app = typer.Typer(add_completion=False)


def as_it_was(folder: Path) -> dict[str, Times]:
    """Microseconds by kernel and (n, k, m): 4 bits in groups of 128, run 1."""
    found: dict[str, Times] = defaultdict(dict)
    for name in ("gemm_decode.csv", "gemm_prefill.csv"):
        for row in ResultFile(folder / name).rows():
            if (row["weight_type"], row["group_size"]) == ("uint4b8", "128") and row["us"]:
                key = (int(row["n"]), int(row["k"]), int(row["m"]))
                found[row["kernel"]][key] = float(row["us"])
    return found


def best(folder: Path, wanted: Callable[[measured.Timing], bool]) -> Times:
    """The fewest microseconds by (n, k, m) in run 2."""
    found: Times = {}
    for each in measured.timings(folder):
        key = (each.shape.n, each.shape.k, each.shape.m)
        if wanted(each) and each.us < found.get(key, math.inf):
            found[key] = each.us
    return found


def speed(times: Times, against: Times) -> dict[int, float]:
    """Geometric mean over the four layers of `against` / `times`, by tokens with all four."""
    found = {}
    for m in sorted({m for *_, m in times}):
        pairs = [(against.get((n, k, m)), times.get((n, k, m))) for n, k in LAYERS]
        if all(a and b for a, b in pairs):
            found[m] = math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs))
    return found


def kernels(folder: Path) -> Figure:
    """Speed relative to cuBLAS on 16-bit weights, by tokens."""
    run_1 = as_it_was(folder)
    run_2 = best(folder, lambda each: each.kernel is None)
    # Run 2 measured cuBLAS from 64 tokens on.
    yardstick = run_1["cublas"] | run_2
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for label, (color, style, kernel) in STOCK.items():
        _line(axis, speed(run_1[kernel], run_1["cublas"]), f"{label} (run 1)", color, style)
    _line(axis, speed(run_1["fusedq"], run_1["cublas"]), f"fusedq ({RUN_1})", OURS, "-")
    _line(
        axis,
        speed(best(folder, measured.is_right_form), yardstick),
        f"fusedq ({RUN_2}, best tile)",
        CHANGED,
        "-",
    )
    sliced = best(folder, lambda each: each.kernel is not None and each.tile is None)
    _line(axis, speed(sliced, yardstick), f"sliced-cublas ({RUN_2})", SLICED, "--")
    axis.axhline(1, color="#111111", linewidth=1, linestyle=":", label="cuBLAS, bf16 weights")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192])
    axis.set_xticklabels([1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192])
    axis.set(xlabel="tokens", ylabel="times the speed of cuBLAS", ylim=(0, None))
    axis.set_title(
        "Layers of Llama-3 8B, int4 in groups of 128, one H200: geometric mean of four\n"
        "(run 2 below 64 tokens: against the cuBLAS of run 1)",
        fontsize=9,
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def serving(folder: Path) -> Figure:
    """Tokens per second of vLLM over those of stock vLLM in the same run."""
    runs = {
        RUN_1: json.loads((folder / "serving-as-it-was.json").read_text()),
        RUN_2: json.loads((folder / "serving-with-changes.json").read_text()),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, width_ratios=(6, 3))
    for axis, phase, title in zip(axes, ("decode", "prefill"), ("batch", "tokens"), strict=True):
        numbers = _numbers(runs[RUN_2]["stock"], phase)
        for shift, (run, sides) in zip((-0.2, 0.2), runs.items(), strict=True):
            color = {RUN_1: OURS, RUN_2: CHANGED}[run]
            _bars(axis, sides, phase, numbers, shift, color, f"fusedq ({run})")
        marlin = [_ratio(runs[RUN_2], "marlin", phase, each) for each in numbers]
        axis.plot(
            range(len(numbers)), marlin, "D", color="#1f77b4", label="stock with Marlin (run 2)"
        )
        axis.axhline(1, color="#111111", linewidth=1, linestyle=":")
        axis.set_xticks(range(len(numbers)), [f"{each:,}" for each in numbers])
        axis.set(xlabel=title, title=phase)
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("tokens/s over stock vLLM's (Machete), same run")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("vLLM 0.26, Llama-3 8B, GPTQ int4 g128, one H200, CUDA graphs", fontsize=9)
    return figure


def _numbers(side: dict[str, list[float]], phase: str) -> list[int]:
    names = (name.removesuffix("_tok_s") for name in side if name.startswith(phase))
    return sorted(int(name.removeprefix(f"{phase}-")) for name in names)


def _ratio(sides: dict, side: str, phase: str, number: int) -> float:
    name = f"{phase}-{number}_tok_s"
    return sides[side][name][0] / sides["stock"][name][0] if name in sides[side] else math.nan


def _bars(
    axis: Axes,
    sides: dict,
    phase: str,
    numbers: Iterable[int],
    shift: float,
    color: str,
    label: str,
) -> None:
    ratios = [_ratio(sides, "fusedq", phase, number) for number in numbers]
    places = [place + shift for place in range(len(ratios))]
    axis.bar(places, ratios, width=0.38, color=color, label=label)
    for place, ratio in zip(places, ratios, strict=True):
        if not math.isnan(ratio):
            axis.text(place, ratio + 0.02, f"{ratio:.2f}", ha="center", fontsize=7)


def _line(axis: Axes, points: dict[int, float], label: str, color: str, style: str) -> None:
    axis.plot(
        list(points),
        list(points.values()),
        style,
        color=color,
        label=label,
        marker="o",
        markersize=4,
    )


FIGURES = {"kernels": kernels, "serving": serving}


@app.command(help=__doc__)
def main(folder: Annotated[Path, typer.Argument(help="benchmarks/results/<device>")]) -> None:
    for name, draw in FIGURES.items():
        figure = draw(folder)
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    app()
