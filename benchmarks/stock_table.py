"""Makes tuned/<device>.stock.json, which `fusedq check` reads, from what bench_gemm.py measured.

    python benchmarks/stock_table.py benchmarks/results/h200
    python benchmarks/stock_table.py FOLDER --dry-run    # from a dry run's files, into FOLDER

Of each problem that one run measured for our kernel and for at least one that vLLM ships, the table
gets one row with the fastest of those. Where a problem was measured in several runs, the last one
counts. Files with rows of another device are refused.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fusedq_kernels import DType, WeightType
from fusedq_kernels.choose import stock
from fusedq_kernels.choose.device import KNOWN_DEVICES, driver_words
from fusedq_kernels.choose.tuning import FOLDER
from gemmbench.results import Problem, ResultFile, commit, problem_of
from gemmbench.vllm_linear import VLLM

OWN = "fusedq"
STOCK = frozenset(each.name for each in VLLM if each.distribution is None)
"""What an installed vLLM has without any other package."""
DRY_DEVICE = "h200"

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    results: Annotated[Path, typer.Argument(help="folder of gemm_*.csv, named like the device")],
    tuned: Annotated[Path | None, typer.Option(help="folder of <device>.stock.json")] = None,
    dry_run: Annotated[bool, typer.Option(help="accept a dry run, write beside it")] = False,
) -> None:
    device = DRY_DEVICE if dry_run else results.resolve().name
    if device not in KNOWN_DEVICES:
        raise typer.BadParameter(f"{device} is no known device: {', '.join(KNOWN_DEVICES)}")
    files = [ResultFile(path) for path in sorted(results.glob("gemm_*.csv"))]
    if not dry_run:
        check_device(files, device)
    rows = sorted(
        stock_rows(row for file in files for row in file.rows()),
        key=lambda row: (row.weight_type.value, row.group_size, row.act_dtype, row.n, row.k, row.m),
    )
    if not rows:
        print(f"no run in {results} measured {OWN} beside one of {', '.join(sorted(STOCK))}")
        raise typer.Exit(1)
    path = stock.file_of(tuned or (results if dry_run else FOLDER), device)
    date = datetime.now(UTC).date().isoformat()
    stock.write(path, stock.StockTable(device, date, commit(), tuple(rows)))
    faster = sum(row.is_faster for row in stock.read(path).rows)
    print(f"{len(rows)} rows in {path}, stock faster in {faster}")


def check_device(files: Iterable[ResultFile], device: str) -> None:
    """Refuse files with a run on anything but `device`, by the name that its driver reports."""
    for file in files:
        for run, header in file.runs().items():
            found = header.get("device", "")
            if device not in driver_words(found):
                raise typer.BadParameter(f"{file.path}: run {run} is of {found!r}, not of {device}")


def stock_rows(rows: Iterable[dict[str, str]]) -> Iterator[stock.StockRow]:
    """One row per problem, from the last run that measured both sides."""
    measured: dict[tuple[Problem, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["us"]:
            measured[problem_of(row), row["run"]][row["kernel"]] = row
    latest: dict[Problem, tuple[str, stock.StockRow]] = {}
    for (problem, run), by_kernel in measured.items():
        others = [by_kernel[name] for name in STOCK & by_kernel.keys()]
        if OWN not in by_kernel or not others or run < latest.get(problem, ("",))[0]:
            continue
        best = min(others, key=lambda row: float(row["us"]))
        latest[problem] = run, _row(problem, float(by_kernel[OWN]["us"]), best)
    return (row for _, row in latest.values())


def _row(problem: Problem, us: float, best: dict[str, str]) -> stock.StockRow:
    return stock.StockRow(
        weight_type=WeightType(problem.weight_type),
        group_size=problem.group_size,
        act_dtype=DType(problem.act_dtype),
        n=problem.n,
        k=problem.k,
        m=problem.m,
        us=us,
        stock=best["kernel"],
        version=best["version"],
        stock_us=float(best["us"]),
    )


if __name__ == "__main__":
    app()
