"""The figure of `fusedq quality`: how often predictions differ, by how much, and where."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_fusedq.measure.quality import Measured, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Places of a window are averaged between these
_EDGES = 2 ** np.arange(0, 21)


def draw(quality: Quality, path: Path) -> None:
    """Write a PNG; needs matplotlib.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, each in enumerate(quality.measured):
        color, label = f"C{number % 10}", f"{each.texts}, windows of {each.max_length}"
        _exceedance(left, each, color, label)
        _by_place(right, each, color, label)
    left.set(
        title="Share of tokens whose log-probability differs by more",
        xlabel="|difference of log-probability| (nats)",
        ylabel="share of tokens",
        xscale="log",
        yscale="log",
    )
    right.set(
        title="KL divergence by the length of the context",
        xlabel="tokens of context (means between powers of two)",
        ylabel="mean KL(reference || model) (nats)",
        xscale="log",
        ylim=(0, None),
    )
    right.xaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(_title(quality), fontsize=10)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _exceedance(axis: "Axes", each: Measured, color: str, label: str) -> None:
    found = np.sort(each.distance.differences)[::-1]
    share = np.arange(1, len(found) + 1) / len(found)
    p99 = each.distance.p99_difference
    axis.plot(found, share, color=color, label=f"{label}; 99 % below {p99:.3g}")
    axis.plot([p99], [0.01], "o", color=color)


def _by_place(axis: "Axes", each: Measured, color: str, label: str) -> None:
    bins = np.digitize(each.places, _EDGES)
    counts = np.bincount(bins, minlength=len(_EDGES))
    sums = np.bincount(bins, weights=each.distance.divergences, minlength=len(_EDGES))
    middles = np.bincount(bins, weights=each.places, minlength=len(_EDGES))
    filled = counts > 0
    mean = f"{label}; mean {each.distance.mean_kl:.3g}"
    axis.plot(
        middles[filled] / counts[filled],
        sums[filled] / counts[filled],
        marker="o",
        markersize=4,
        color=color,
        label=mean,
    )


def _title(quality: Quality) -> str:
    sides = (quality.model, quality.reference)
    names = [f"{Path(side.model).name} ({side.way})" for side in sides]
    dtypes = [quality.served[side.name]["dtype"] for side in sides]
    device = quality.served[quality.model.name]["device"]
    return f"{names[0]}, {dtypes[0]}, against {names[1]}, {dtypes[1]}; {device}"
