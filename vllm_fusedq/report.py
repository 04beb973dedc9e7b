"""The plan as people read it: equal layers folded into rows of one table, and the counts."""

import io
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_fusedq.plan import LayerPlan
from vllm_fusedq.preflight import index_ranges

logger = logging.getLogger("vllm.fusedq")

_LAYER_INDEX = re.compile(r"\.(\d+)\.")
COLUMNS = ("layers", "format", "K x N per rank", "phase", "kernel", "decode", "prefill", "MB")


def plan_table(plans: Sequence[LayerPlan]) -> Table:
    """One row per kind of layer, with the kernel named."""
    rows: dict[tuple[str, ...], list[LayerPlan]] = defaultdict(list)
    for plan in plans:
        rows[(_LAYER_INDEX.sub(".{}.", plan.prefix, count=1), *_cells(plan))].append(plan)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in COLUMNS:
        table.add_column(column, overflow="fold", justify="right" if column == "MB" else "left")
    for (pattern, *cells), members in rows.items():
        size = sum(plan.weight_bytes + plan.metadata_bytes for plan in members) / 1e6
        table.add_row(_folded_name(pattern, members), *cells, f"{size:.2f}")
    return table


def summary(plans: Sequence[LayerPlan], unquantized: Sequence[str]) -> str:
    """One line with the counts that matter."""
    kernels = Counter(plan.kernel.value for plan in plans)
    named = ", ".join(f"{count} x {kernel}" for kernel, count in kernels.items())
    return (
        f"fused: {len(plans)} ({named}); unquantized by the checkpoint: {len(unquantized)}; "
        "fallbacks: 0"
    )


def render(table: Table, width: int = 160) -> str:
    """The table as plain text, for logs."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


def log_plan(plans: Sequence[LayerPlan], unquantized: Sequence[str]) -> None:
    """Log the folded plan at INFO, once per engine."""
    table = render(plan_table(plans))
    logger.info("fusedq kernel plan\n%s%s", table, summary(plans, unquantized))


def _cells(plan: LayerPlan) -> tuple[str, ...]:
    k = str(plan.k) if plan.rows == plan.k else f"{plan.k} as {plan.rows}"
    return (
        " + ".join(dict.fromkeys(part.description for part in plan.formats)),
        f"{k} x {plan.n}",
        str(plan.phase),
        plan.kernel.value,
        plan.decode.source,
        plan.prefill.source,
    )


def _folded_name(pattern: str, members: Sequence[LayerPlan]) -> str:
    indices = [int(m.group(1)) for plan in members if (m := _LAYER_INDEX.search(plan.prefix))]
    if len(members) == 1 or not indices:
        return members[0].prefix
    return f"{pattern.replace('{}', index_ranges(indices), 1)} x{len(members)}"
