"""The plan as people read it: equal layers folded into rows of one table, and the counts."""

import io
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fusedq_kernels.types import Launch
from vllm_fusedq.errors import Problem
from vllm_fusedq.names import fold, unnumbered
from vllm_fusedq.plan.experts import experts_told
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.uses import SHOWN_TOKENS, Use

logger = logging.getLogger("vllm.fusedq")

_NUMBERS = ("MB", "meta MB", "bits/w")
COLUMNS = (
    *("layers", "format", "K x N per rank", "phase", "kernel", *SHOWN_TOKENS),
    *(*_NUMBERS, "verdict"),
)
# Wider than any plan: a table takes what it needs, and no row is folded where lines are searched
LOG_WIDTH = 1000


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Layers that differ in their number alone; `plan` is the first of them."""

    name: str
    plan: LayerPlan
    count: int

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of all these layers, by tensor."""
        return {name: size * self.count for name, size in self.plan.resident}


def plan_rows(plans: Sequence[LayerPlan]) -> list[PlanRow]:
    """One row per kind of layer, in the order of the model."""
    rows: dict[tuple[object, ...], list[LayerPlan]] = defaultdict(list)
    for plan in plans:
        formats = tuple(dict.fromkeys(fmt.description for fmt in plan.formats))
        shape = (plan.n, plan.k, plan.rows, plan.phase, plan.resident, plan.experts)
        launches = tuple(use.launches for use in plan.uses)
        rows[(unnumbered(plan.name), formats, *shape, *launches)].append(plan)
    return [PlanRow(_row_name(members), members[0], len(members)) for members in rows.values()]


def plan_table(plans: Sequence[LayerPlan], problems: Sequence[Problem] = ()) -> Table:
    """One row per kind of layer, with the kernel named; refused ones last."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in COLUMNS:
        table.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    for row in plan_rows(plans):
        table.add_row(*_cells(row))
    for problem in problems:
        table.add_row(_name_of(problem), *[""] * (len(COLUMNS) - 2), "refused", style="red")
    return table


def fitting_plan(
    console: Console, plans: Sequence[LayerPlan], problems: Sequence[Problem] = ()
) -> RenderableType:
    """`plan_table` where it fits the console, else a line for each cell, so that no name is cut."""
    table = plan_table(plans, problems)
    natural = console.measure(table, options=console.options.update(width=LOG_WIDTH)).maximum
    if natural <= console.width:
        return table
    lines: list[RenderableType] = []
    for row in plan_rows(plans):
        name, *cells = _cells(row)
        grid = Table.grid(padding=(0, 2))
        for heading, cell in zip(COLUMNS[1:], cells, strict=True):
            grid.add_row(f"  {heading}", cell)
        lines += [Text(name, style="bold"), grid]
    lines += [Text(f"{_name_of(problem)}: refused", style="red") for problem in problems]
    return Group("", *lines, "")


def summary(plans: Sequence[LayerPlan], unquantized: Sequence[str]) -> str:
    """One line with the counts that matter."""
    kernels = Counter(_kernels(plan) for plan in plans)
    named = ", ".join(f"{count} x {kernel}" for kernel, count in kernels.items())
    of_which = f" ({named})" if named else ""
    return (
        f"fused: {len(plans)}{of_which}; unquantized by the checkpoint: {len(unquantized)}; "
        "fallbacks: 0"
    )


def render(table: Table, width: int = LOG_WIDTH) -> str:
    """The table as plain text, for logs."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


def log_plan(plans: Sequence[LayerPlan], unquantized: Sequence[str]) -> None:
    """Log the folded plan at INFO, once per engine."""
    table = render(plan_table(plans))
    logger.info("fusedq kernel plan\n%s%s", table, summary(plans, unquantized))


def describe_launch(launch: Launch) -> str:
    """Like "rule: m<=8, 8x128, split 4"; a measured row's tile stands before its source."""
    if launch.tile is None or launch.source.startswith("rule"):
        return launch.source
    split = f", split {launch.tile.split_k}" if launch.tile.split_k > 1 else ""
    return f"{launch.tile.block_m}x{launch.tile.block_n}{split}, {launch.source}"


def _kernels(plan: LayerPlan) -> str:
    """The kernel of each use, and the others that some number of tokens reaches."""
    launches = (launch for use in plan.uses for _, launch in use.launches)
    return " + ".join(dict.fromkeys(launch.kernel for launch in launches))


def _prefill(use: Use) -> str:
    """A long prompt's launch, and from where on another kernel than the use's own runs."""
    launch, beside = use.launch(SHOWN_TOKENS["prefill"]), use.beside
    if beside is None:
        return describe_launch(launch)
    tokens, other = beside
    workspace = f"{use.scratch_bytes(tokens) / 1e6:.1f} MB workspace"
    told = f"{other.kernel} from {tokens} tokens, {workspace}, {other.source}"
    return told if launch.kernel == other.kernel else f"{describe_launch(launch)}; {told}"


def _name_of(problem: Problem) -> str:
    return problem.layer.partition(" (out_features")[0]


def _cells(row: PlanRow) -> tuple[str, ...]:
    plan = row.plan
    k = str(plan.k) if plan.rows == plan.k else f"{plan.k} as {plan.rows}"
    return (
        row.name,
        " + ".join(dict.fromkeys(part.description for part in plan.formats)),
        f"{k} x {plan.n}",
        str(plan.phase),
        _kernels(plan),
        describe_launch(plan.launch(SHOWN_TOKENS["decode"])),
        _prefill(plan.main),
        f"{plan.weight_bytes * row.count / 1e6:.2f}",
        f"{plan.metadata_bytes * row.count / 1e6:.2f}",
        f"{plan.bits_per_weight:.2f}",
        "fused",
    )


def _row_name(plans: Sequence[LayerPlan]) -> str:
    name = fold([plan.name for plan in plans])
    name = f"{name} x{len(plans)}" if len(plans) > 1 else name
    experts = experts_told(plans[0].experts)
    return f"{name} ({experts})" if experts else name
