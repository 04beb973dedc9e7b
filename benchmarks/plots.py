"""The figures of the kernel benchmarks, from the CSV files alone.

    python benchmarks/plots.py benchmarks/results/h200

reads gemm_decode.csv and gemm_prefill.csv there and writes a PNG per figure beside them. Medians
where several runs or layers meet in one point.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import pandas as pd
import typer

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gemmbench.results import ResultFile

OURS, TWIN, YARDSTICK = "fusedq", "load-only", "cublas"
ABLATIONS = ("without-dequant", OURS, "dequant-twice")
SPEEDUP_TOKENS = (1, 16, 64)
# One color per kernel in every figure; ours in front of the others.
COLORS = dict(
    zip(
        (
            *(
                OURS,
                "fusedq-invariant",
                "fusedq-sliced",
                YARDSTICK,
                "marlin",
                "machete",
                "humming",
                "gemlite",
                "conch",
            ),
            *("vllm-triton", "bitsandbytes", "dequant+cublas", "dequant+tiled", TWIN),
        ),
        (
            *(
                "#d62728",
                "#f4a6a6",
                "#c06060",
                "#111111",
                "#1f77b4",
                "#17becf",
                "#2ca02c",
                "#9467bd",
                "#8c564b",
            ),
            *("#e377c2", "#ff7f0e", "#7f7f7f", "#bcbd22", "#aaaaaa"),
        ),
        strict=True,
    )
)

app = typer.Typer(add_completion=False)


def load(path: Path) -> pd.DataFrame:
    """Timed rows of a result file; of a problem measured again the last one counts."""
    frame = pd.read_csv(path, comment="#")
    frame = frame[frame["us"].notna()]
    problem = ["weight_type", "group_size", "act_dtype", "n", "k", "m", "kernel"]
    return frame.drop_duplicates(problem, keep="last").reset_index(drop=True)


def speedup_against_n(decode: pd.DataFrame) -> Figure:
    """cuBLAS time over each kernel's, against the width of the layer, for few to many tokens."""
    shown = [m for m in SPEEDUP_TOKENS if m in set(decode["m"])] or sorted(set(decode["m"]))[:3]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(5 * len(shown), 4.2), sharey=True, squeeze=False
    )
    for axis, m in zip(axes[0], shown, strict=True):
        rows = decode[(decode["m"] == m) & ~decode["kernel"].isin([TWIN, *_variants()])]
        _lines(axis, rows, "n", "vs_cublas")
        axis.axhline(1, color=COLORS[YARDSTICK], linewidth=0.8, linestyle=":")
        axis.set_title(f"M = {m}")
        _width_axis(axis, rows["n"])
    axes[0][0].set_ylabel("speed-up over cuBLAS 16 bit")
    _legend(axes[0][-1])
    return figure


def percent_of_peak(decode: pd.DataFrame) -> Figure:
    """Time of the load-only twin over each kernel's: 100 % is streaming the packed weight."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    packed = decode[~decode["kernel"].isin([TWIN, YARDSTICK, *_variants()])]
    _lines(axis, packed, "m", "pct_twin")
    axis.axhline(100, color=COLORS[TWIN], linewidth=0.8, linestyle=":")
    axis.set(ylabel="% of the load-only twin", ylim=(0, None))
    _token_axis(axis, packed["m"])
    _legend(axis)
    return figure


def dequant_breakdown(decode: pd.DataFrame) -> Figure:
    """Our kernel at the fewest tokens with dequantization left out, as it is, and done twice."""
    rows = decode[decode["kernel"].isin(ABLATIONS) & (decode["m"] == decode["m"].min())]
    rows = rows.assign(shape=rows["n"].astype(str) + " x " + rows["k"].astype(str))
    times = rows.pivot_table(
        index=["weight_type", "shape"], columns="kernel", values="us", aggfunc="median"
    ).reindex(columns=list(ABLATIONS))
    times.index = [f"{weight_type}\n{shape}" for weight_type, shape in times.index]
    figure, axis = plt.subplots(figsize=(max(6.4, 1.3 * len(times)), 4.2))
    times.plot.bar(ax=axis, color=["#cccccc", COLORS[OURS], "#8b1a1a"], rot=0, width=0.8)
    axis.set(xlabel="", ylabel="microseconds", title=f"M = {decode['m'].min()}")
    axis.margins(y=0.3)  # Room for the legend above the bars
    axis.legend(["no dequantization", "fusedq", "dequantization twice"], frameon=False)
    return figure


def bandwidth_against_m(decode: pd.DataFrame) -> Figure:
    """Packed bytes per second of our kernel for each layer, and of the twin."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    ours = decode[decode["kernel"] == OURS]
    for (n, k), rows in ours.groupby(["n", "k"]):
        line = rows.groupby("m")["weight_gbs"].median()
        axis.plot(line.index, line.to_numpy(), marker="o", markersize=3, label=f"{n} x {k}")
    twin = decode[decode["kernel"] == TWIN].groupby("m")["weight_gbs"].max()
    axis.plot(twin.index, twin.to_numpy(), color=COLORS[TWIN], linestyle=":", label="best twin")
    axis.set(ylabel="GB/s of packed weight", ylim=(0, None))
    _token_axis(axis, ours["m"])
    _legend(axis, title="N x K")
    return figure


def prefill_crossover(prefill: pd.DataFrame) -> Figure:
    """Speed against cuBLAS by tokens: where dequantizing first overtakes the fused kernel."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    rows = prefill[~prefill["kernel"].isin([TWIN, *_variants()])]
    _lines(axis, rows, "m", "vs_cublas")
    axis.set(ylabel="speed relative to cuBLAS 16 bit", ylim=(0, None))
    _token_axis(axis, rows["m"])
    _legend(axis)
    return figure


# Each with its phase and what it shows
FIGURES: dict[str, tuple[str, str, Callable[[pd.DataFrame], Figure]]] = {
    "speedup_against_n": ("decode", "Speed-up over 16-bit cuBLAS", speedup_against_n),
    "percent_of_peak": ("decode", "Speed relative to streaming the packed weight", percent_of_peak),
    "dequant_breakdown": ("decode", "Time of dequantization", dequant_breakdown),
    "bandwidth_against_m": ("decode", "Packed weight read, with metadata", bandwidth_against_m),
    "prefill_crossover": ("prefill", "Many tokens: speed over 16-bit cuBLAS", prefill_crossover),
}


def title_of(what: str, frame: pd.DataFrame, device: str) -> str:
    """What a figure shows, of which weights, on what."""
    weights = frame.groupby("weight_type")["group_size"].unique()
    told = ", ".join(
        f"{name} in groups of {' and '.join(map(str, sorted(groups)))}"
        for name, groups in weights.items()
    )
    return f"{what}\n{told}; {device}"


def _variants() -> tuple[str, ...]:
    return tuple(name for name in ABLATIONS if name != OURS)


def _token_axis(axis: Axes, tokens: pd.Series) -> None:
    axis.set_xscale("log", base=2)
    values = sorted(set(tokens))
    axis.set_xticks(values, [str(value) for value in values])
    axis.set_xlabel("tokens M")


def _width_axis(axis: Axes, widths: pd.Series) -> None:
    axis.set_xscale("log")
    values = sorted(set(widths))
    axis.set_xticks(values, [str(value) for value in values], rotation=45)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("out_features N")


def _lines(axis: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    for kernel in [name for name in COLORS if name in set(rows["kernel"])]:
        line = rows[rows["kernel"] == kernel].groupby(x)[y].median()
        front = kernel == OURS
        axis.plot(
            line.index,
            line.to_numpy(),
            marker="o",
            markersize=4 if front else 3,
            linewidth=2 if front else 1.2,
            zorder=3 if front else 2,
            color=COLORS[kernel],
            label=kernel,
        )
    axis.grid(alpha=0.3)


def _legend(axis: Axes, title: str | None = None) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    axis.legend(title=title, frameon=False, fontsize=8, **place)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Argument(help="holds gemm_decode.csv and gemm_prefill.csv")],
    out: Annotated[Path | None, typer.Option(help="folder of the PNG files")] = None,
) -> None:
    target = out or folder
    target.mkdir(parents=True, exist_ok=True)
    frames, devices = {}, {}
    for phase in ("decode", "prefill"):
        path = folder / f"gemm_{phase}.csv"
        if not path.exists():
            raise typer.BadParameter(f"{path} is missing; benchmarks/bench_gemm.py writes it")
        frames[phase] = load(path)
        runs = ResultFile(path).runs().values()
        devices[phase] = ", ".join(dict.fromkeys(run["device"] for run in runs if "device" in run))
    for name, (phase, what, draw) in FIGURES.items():
        figure = draw(frames[phase])
        figure.suptitle(title_of(what, frames[phase], devices[phase]), y=1.04, fontsize=10)
        figure.savefig(target / f"{name}.png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        print(target / f"{name}.png")


if __name__ == "__main__":
    app()
