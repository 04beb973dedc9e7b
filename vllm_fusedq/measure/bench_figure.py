"""The figure of `fusedq bench`: bandwidth, speed-up against N, what decoding costs, a step."""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_fusedq.measure.bench import Bench, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(model: str, found: Bench, path: Path) -> None:
    """Write a PNG; needs matplotlib.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    panels = (_bandwidth, _speedup, _decoding, _step)
    for panel, axis in zip(panels, axes.flat, strict=True):
        panel(axis, found)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8, frameon=False)
    title = f"{Path(model).name}: quantized layers on {found.device}, {found.dtype}"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _bandwidth(axis: "Axes", found: Bench) -> None:
    for label, rows in _by_layer(found).items():
        axis.plot([row.m for row in rows], [row.gbs for row in rows], marker="o", label=label)
    tokens = _tokens(found)
    limit = [max(row.read_gbs for row in found.rows if row.m == m) for m in tokens]
    axis.plot(tokens, limit, color="black", linestyle="--", label="read bandwidth, same rounds")
    axis.set(
        title="Packed weight read, with metadata",
        xlabel="tokens M",
        ylabel="GB/s",
        xscale="log",
        ylim=(0, 1.25 * max(*limit, *(row.gbs for row in found.rows))),
    )
    axis.set_xticks(tokens, [str(m) for m in tokens])
    axis.minorticks_off()


def _decoding(axis: "Axes", found: Bench) -> None:
    """How much shorter a call is without decoding."""
    for label, rows in _by_layer(found).items():
        known = [(row.m, 100 * row.decoding) for row in rows if row.decoding is not None]
        axis.plot(*zip(*known, strict=True), marker="o", label=label) if known else None
    tokens = _tokens(found)
    axis.axhline(0, color="black", linestyle="--", label="decoding that costs nothing")
    axis.set(
        title="Share of dequantization: how much shorter the kernel is without it",
        xlabel="tokens M",
        ylabel="% of the kernel's time",
        xscale="log",
        ylim=(-10, 100),
    )
    axis.set_xticks(tokens, [str(m) for m in tokens])
    axis.minorticks_off()


def _speedup(axis: "Axes", found: Bench) -> None:
    sizes = sorted({(row.n, row.k) for row in found.rows})
    for m in _tokens(found):
        rows = sorted((row for row in found.rows if row.m == m), key=lambda row: (row.n, row.k))
        places = [sizes.index((row.n, row.k)) for row in rows]
        axis.plot(places, [row.speedup for row in rows], marker="o", label=f"M = {m}")
    axis.axhline(1, color="black", linestyle="--", label="unquantized layer")
    axis.set(
        title="Speed-up over the unquantized layer",
        xlabel="out_features N (x in_features K)",
        ylabel="times its speed",
        ylim=(0, None),
    )
    axis.set_xticks(range(len(sizes)), [f"{n}\n(x {k})" for n, k in sizes], fontsize=8)


def _step(axis: "Axes", found: Bench) -> None:
    """What reading the weights alone would take, and what decoding and multiplying adds to it."""
    tokens, reads, rests = _tokens(found), [], []
    for step in found.steps:
        rows = [row for row in found.rows if row.m == step.m]
        reading = sum(row.count * row.weight_bytes / row.read_gbs / 1e3 for row in rows)
        share = min(1.0, reading / step.fused_us)
        reads.append(100 * share)
        rests.append(100 * (1 - share))
    places = range(len(tokens))
    axis.bar(places, reads, label="reading the packed weights alone", color="C7")
    axis.bar(places, rests, bottom=reads, label="beyond it: what no reading hides")
    for place, step in zip(places, found.steps, strict=True):
        axis.text(place, 101, f"{step.fused_us / 1e3:.4g} ms", ha="center", fontsize=8)
    axis.set(
        title="Time of a step, all measured layers",
        xlabel="tokens M",
        ylabel="% of the step",
        ylim=(0, 130),
    )
    axis.set_xticks(places, [str(m) for m in tokens])


def _tokens(found: Bench) -> list[int]:
    return list(dict.fromkeys(row.m for row in found.rows))


def _by_layer(found: Bench) -> dict[str, list[Row]]:
    layers: dict[str, list[Row]] = {}
    for row in found.rows:
        layers.setdefault(f"{_short(row)}, {row.n} x {row.k}", []).append(row)
    return layers


def _short(row: Row) -> str:
    return row.layers.partition(" ")[0].rpartition(".")[2]
