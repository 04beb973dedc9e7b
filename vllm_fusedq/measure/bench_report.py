"""What `fusedq bench` found, as tables and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from vllm_fusedq.measure.bench import Bench, Row
from vllm_fusedq.measure.serving import Served
from vllm_fusedq.report.document import document


def layers_table(found: Bench) -> Table:
    """One row for each kind of layer and number of tokens."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("layers", "format", "N x K per rank", "kernel"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "us", "+-", "MB", "GB/s", "% of read", "unquantized us", "times it"):
        table.add_column(column, justify="right")
    before = None
    for row in found.rows:
        name = (row.layers, row.format, f"{row.n} x {row.k}")
        table.add_row(*(name if name != before else ("", "", "")), row.kernel, *_numbers(row))
        before = name
    return table


def _numbers(row: Row) -> tuple[str, ...]:
    return (
        *(str(row.m), f"{row.fused.us:.1f}", f"{row.fused.iqr_us / 2:.1f}"),
        *(f"{row.weight_bytes / 1e6:.2f}", f"{row.gbs:.1f}", f"{row.percent_read:.0f}"),
        *(f"{row.dense.us:.1f}", f"{row.speedup:.2f}"),
    )


def steps_table(found: Bench) -> Table:
    """All measured layers of the model, once each, by tokens."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("all measured layers")
    columns = ("ms a step", "unquantized ms", "times it", "MB", "GB/s")
    ablated = any(step.decoding is not None for step in found.steps)
    for column in (*columns, "% decoding") if ablated else columns:
        table.add_column(column, justify="right")
    for step in found.steps:
        table.add_row(
            f"{step.m} token{'s' * (step.m != 1)}",
            *(f"{step.fused_us / 1e3:.3f}", f"{step.dense_us / 1e3:.3f}"),
            f"{step.dense_us / step.fused_us:.2f}",
            *(f"{step.weight_bytes / 1e6:.1f}", f"{step.weight_bytes / step.fused_us / 1e3:.1f}"),
            *([] if step.decoding is None else [f"{100 * step.decoding:.0f}"]),
        )
    return table


def summary(found: Bench) -> str:
    """On which device, and what was not measured."""
    low, high = (pick(row.read_gbs for row in found.rows) for pick in (min, max))
    skipped = f"; not measured: {', '.join(found.skipped)}" if found.skipped else ""
    return (
        f"{found.device}, {found.dtype}; medians, +- half the interquartile range; it reads "
        f"{low:.1f} to {high:.1f} GB/s in the same rounds{skipped}"
    )


def serving_table(served: Sequence[Served]) -> Table:
    """Sides beside each other: tokens per second, time to first token, cold start by parts."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("served")
    for side in served:
        table.add_column(side.way, justify="right")
    names = dict.fromkeys(name for side in served for name in side.values)
    for name in names:
        cells = (side.values.get(name) for side in served)
        table.add_row(name, *("" if value is None else f"{value:.2f}" for value in cells))
    return table


def bench_json(model: str, found: Bench, served: Sequence[Served]) -> dict[str, Any]:
    """The document of docs/schemas/bench.v1.json."""
    return document(
        "bench",
        model=model,
        device=found.device,
        dtype=found.dtype,
        layers=[_row_json(row) for row in found.rows],
        steps=[
            {
                "tokens": step.m,
                "us": step.fused_us,
                "unquantized_us": step.dense_us,
                "weight_bytes": step.weight_bytes,
                "decoding": step.decoding,
            }
            for step in found.steps
        ],
        not_measured=list(found.skipped),
        served=[{"way": side.way, "values": side.values} for side in served],
    )


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "layers": row.layers,
        "count": row.count,
        "format": row.format,
        "kernel": row.kernel,
        "out_features": row.n,
        "in_features": row.k,
        "tokens": row.m,
        "us": row.fused.us,
        "iqr_us": row.fused.iqr_us,
        "samples": row.fused.samples,
        "weight_bytes": row.weight_bytes,
        "gbs": row.gbs,
        "read_gbs": row.read_gbs,
        "percent_read": row.percent_read,
        "unquantized_us": row.dense.us,
        "speedup": row.speedup,
        "decoding": row.decoding,
    }
