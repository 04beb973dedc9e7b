"""`fusedq quality` on the committed checkpoints: the bfloat16 model against each quantized one.

    python benchmarks/quality_assets.py benchmarks/results/cpu/quality
    python benchmarks/quality_assets.py benchmarks/results/cpu/quality --table-only

Writes the folder's NAME.json for each checkpoint, quality.csv of them all, the plot of one, and the
table in docs/quality.md.
"""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
ASSETS, PAGE = ROOT / "tests" / "assets", ROOT / "docs" / "quality.md"
BASE, PLOTTED = "tiny-llama-bf16", "tiny-llama-gptq-mixed"
# One block only, and so made from another model: nothing to compare with here
OTHERS = ("tiny-llama-ct-tied", "tiny-qwen3-moe-ct-g64")
STOCK = "tiny-llama-gptq-g128"
HEAD = (
    "| checkpoint | against | texts | perplexity ratio | mean \\|d logp\\| | p99 \\|d logp\\| "
    "| same top 1 | mean KL |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
COLUMNS = (
    *("checkpoint", "against", "texts", "max_length", "windows", "tokens", "perplexity"),
    *("reference_perplexity", "perplexity_ratio", "mean_difference", "p99_difference"),
    *("top1_agreement", "mean_kl", "p99_kl", "compared"),
)
Row = dict[str, object]

app = typer.Typer(add_completion=False)


def pairs() -> list[tuple[str, str]]:
    """(checkpoint, reference) for each row's two, stock vLLM on the same checkpoint last."""
    names = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    quantized = [name for name in names if name not in (BASE, *OTHERS)]
    return [*((name, BASE) for name in quantized), (STOCK, "stock")]


def measure(folder: Path, name: str, against: str) -> None:
    """Run the command as a user does; its document goes to a file."""
    reference = against if against == "stock" else f"tests/assets/{against}"
    command = [sys.executable, "-m", "vllm_fusedq.cli", "quality", f"tests/assets/{name}"]
    command += ["--against", reference, "--json"]
    if (name, against) == (PLOTTED, BASE):
        command += ["--plot", str((folder / "quality.png").resolve())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    (folder / f"{name}.{against}.json").write_text(done.stdout)


def rows(folder: Path) -> list[Row]:
    """Every row of every document."""
    found: list[Row] = []
    for name, against in pairs():
        document = json.loads((folder / f"{name}.{against}.json").read_text())
        found += [{"checkpoint": name, "against": against, **row} for row in document["texts"]]
    return found


def as_csv(found: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def table(found: list[Row]) -> str:
    """The table in Markdown."""
    return HEAD + "".join(
        f"| {row['checkpoint']} | {row['against']} | {row['texts']} "
        f"| {row['perplexity_ratio']:.4f} | {row['mean_difference']:.4f} "
        f"| {row['p99_difference']:.4f} | {100 * row['top1_agreement']:.1f} % "
        f"| {row['mean_kl']:.2g} |\n"
        for row in found
    )


def with_table(text: str, found: list[Row]) -> str:
    """`text` with its table replaced; raises ValueError where it has none."""
    start = text.index(HEAD)
    stop = text.index("\n\n", start) + 1
    return text[:start] + table(found) + text[stop:]


@app.command(help=__doc__)
def main(folder: Path, table_only: Annotated[bool, typer.Option("--table-only")] = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not table_only:
        for name, against in pairs():
            print(name, "against", against, flush=True)
            measure(folder, name, against)
    found = rows(folder)
    (folder / "quality.csv").write_text(as_csv(found))
    PAGE.write_text(with_table(PAGE.read_text(), found))


if __name__ == "__main__":
    app()
