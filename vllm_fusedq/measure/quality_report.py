"""What `fusedq quality` found, as a table, as JSON, and beside what the user allows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from vllm_fusedq.measure.quality import Measured, Quality, Side
from vllm_fusedq.measure.tasks import TaskScore
from vllm_fusedq.report.document import document

# Of a Distance, those that have a value for each token
_BY_TOKEN = ("differences", "divergences")


@dataclass(frozen=True)
class Limits:
    """What may not be exceeded on any set of texts; None allows everything."""

    max_kl: float | None = None
    max_ppl_ratio: float | None = None

    def exceeded(self, quality: Quality) -> list[str]:
        """One sentence for each value above its limit, or that is no number."""
        found = []
        for each in quality.measured:
            for what, value, limit in (
                ("mean KL divergence", each.distance.mean_kl, self.max_kl),
                ("perplexity ratio", each.distance.perplexity_ratio, self.max_ppl_ratio),
            ):
                if limit is not None and not value <= limit:
                    found.append(
                        f"{each.texts}, windows of {each.max_length}: {what} {value:.6g} exceeds "
                        f"{limit:g}"
                    )
        return found


def quality_table(quality: Quality) -> Table:
    """One row for each set of texts and length of windows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("texts")
    for column in (
        *("window", "tokens", "perplexity", "of reference", "ratio", "mean |d logp|"),
        *("p99 |d logp|", "same top 1", "mean KL", "p99 KL"),
    ):
        table.add_column(column, justify="right")
    for each in quality.measured:
        table.add_row(*cells(each))
    return table


def cells(each: Measured) -> tuple[str, ...]:
    """One row as people read it."""
    found = each.distance
    return (
        *(each.texts, str(each.max_length), str(found.tokens), f"{found.perplexity:.4g}"),
        *(f"{found.reference_perplexity:.4g}", f"{found.perplexity_ratio:.4f}"),
        *(f"{found.mean_difference:.4f}", f"{found.p99_difference:.4f}"),
        *(f"{100 * found.top1_agreement:.1f} %", f"{found.mean_kl:.6f}", f"{found.p99_kl:.6f}"),
    )


def summary(quality: Quality) -> str:
    """Which model stands beside which, and what was compared how."""
    compared = min(each.distance.compared for each in quality.measured)
    served = "; ".join(
        f"{name}: {said['dtype']} on {said['device']}" for name, said in quality.served.items()
    )
    return (
        f"{quality.model.name} against {quality.reference.name}; nats, natural logarithms; "
        f"KL over outcomes with {100 * compared:.1f} % of the reference's probability, "
        f"all others as one; {served}"
    )


def tasks_table(scores: Sequence[TaskScore]) -> Table:
    """One row for each metric of each task."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("model", "reference", "difference"):
        table.add_column(column, justify="right")
    for score in scores:
        table.add_row(
            *(score.task, score.metric, _with_error(score.model, score.model_error)),
            *(_with_error(score.reference, score.reference_error),),
            f"{score.model - score.reference:+.4f}",
        )
    return table


def quality_json(
    quality: Quality, scores: Sequence[TaskScore], exceeded: Sequence[str]
) -> dict[str, Any]:
    """The document of docs/schemas/quality.v1.json; what is no number is null."""
    rows = []
    for each in quality.measured:
        found = {"texts": each.texts, "max_length": each.max_length, "windows": each.windows}
        for name in each.distance.__slots__:
            if name not in _BY_TOKEN:
                found[name] = finite(getattr(each.distance, name))
        rows.append(found)
    return document(
        "quality",
        model=_side(quality.model, quality),
        reference=_side(quality.reference, quality),
        texts=rows,
        tasks=[asdict(score) for score in scores],
        exceeded=list(exceeded),
    )


def finite(value: float) -> float | None:
    """JSON has no infinities, and no NaN."""
    return value if math.isfinite(value) else None


def _side(side: Side, quality: Quality) -> dict[str, Any]:
    return {"model": side.model, "quantization": side.quantization, **quality.served[side.name]}


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
