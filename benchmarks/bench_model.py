"""`fusedq bench` on the layers of a published model, and the section of it in docs/bench.md.

    python benchmarks/bench_model.py benchmarks/results/cpu
    python benchmarks/bench_model.py benchmarks/results/cpu --page-only

Writes bench.csv, a row for each layer and number of tokens, and bench.png to the folder. The model
is headers alone, without weights. Run it on a quiet machine: three minutes on two cores, and one
more where cpu-fused without decoding has not been compiled before.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from gemmbench.results import ROOT, ResultFile, environment

if __name__ == "__main__":
    sys.path.append(str(ROOT / "tests" / "support"))

PAGE = ROOT / "docs" / "bench.md"
MODEL, FORMAT = "Qwen3-8B", "awq"
TITLE = "## Measured"
HEAD = (
    "| tokens | ms a step | unquantized, ms | times it | GB/s | % of reading | % decoding |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)
COLUMNS = (
    *("run", "layers", "count", "format", "kernel", "out_features", "in_features", "tokens", "us"),
    *("iqr_us", "samples", "weight_bytes", "gbs", "read_gbs", "percent_read", "unquantized_us"),
    *("speedup", "decoding"),
)
# Of the committed picture, which is to be small
PIXELS, COLOURS = (960, 960), 64

app = typer.Typer(add_completion=False)


def measure(folder: Path, options: list[str]) -> None:
    """Run the command as a user does, on the model's headers."""
    from published import MODELS, write_headers

    plot = folder.resolve() / "bench.png"
    with tempfile.TemporaryDirectory() as models:
        model = Path(models) / f"{MODEL}-{FORMAT}"
        model.mkdir()
        write_headers(model, MODELS[MODEL], FORMAT)
        command = [sys.executable, "-m", "vllm_fusedq.cli", "bench", str(model), "--json"]
        command += ["--plot", str(plot), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    document = json.loads(done.stdout)
    header = environment(torch.device("cpu")) | {"device": document["device"]}
    (folder / "bench.csv").unlink(missing_ok=True)
    rows = [{name: rounded(value) for name, value in row.items()} for row in document["layers"]]
    ResultFile(folder / "bench.csv", COLUMNS).append(rows, header)
    picture = Image.open(plot).convert("RGB")
    picture.thumbnail(PIXELS)
    # The default method merges the colours of lines
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(plot, optimize=True)


def rounded(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def table(rows: list[dict[str, str]]) -> str:
    """Steps of the model, by tokens, in Markdown."""
    found = HEAD
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        of = [row for row in rows if row["tokens"] == tokens]

        def total(name: str, of: list[dict[str, str]] = of) -> float:
            return sum(int(row["count"]) * float(row[name]) for row in of)

        us, size = total("us"), total("weight_bytes")
        reading = sum(
            int(row["count"]) * float(row["weight_bytes"]) / float(row["read_gbs"]) / 1e3
            for row in of
        )
        decoding = sum(int(row["count"]) * float(row["us"]) * float(row["decoding"]) for row in of)
        found += (
            f"| {int(tokens):,} | {us / 1e3:.1f} | {total('unquantized_us') / 1e3:.1f} "
            f"| {total('unquantized_us') / us:.2f} | {size / us / 1e3:.1f} "
            f"| {100 * reading / us:.0f} | {100 * decoding / us:.0f} |\n"
        )
    return found


def with_section(text: str, file: Path) -> str:
    """`text` with what `file` says as its last section."""
    stored = ResultFile(file, COLUMNS)
    rows, (run,) = stored.rows(), stored.runs().values()
    link = os.path.relpath(file.parent, PAGE.parent)
    return text.partition(f"\n{TITLE}\n")[0] + (
        f"\n{TITLE}\n\n`python benchmarks/{run['command']}`, {run['date'][:10]}, torch "
        f"{run['torch']}, commit {run['commit']}: {MODEL}, {rows[0]['format']}, on\n"
        f"{run['device']}. [bench.csv]({link}/bench.csv) has each layer.\n\n"
        f"{table(rows)}\n"
        f"![Bandwidth, speed-up, share of dequantization, a step]({link}/bench.png)\n"
    )


@app.command(
    help=__doc__, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def main(
    context: typer.Context,
    folder: Path,
    page_only: Annotated[bool, typer.Option("--page-only")] = False,
) -> None:
    if not page_only:
        measure(folder, context.args)
    PAGE.write_text(with_section(PAGE.read_text(), folder / "bench.csv"))


if __name__ == "__main__":
    app()
