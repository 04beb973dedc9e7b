"""`fusedq quality`: what quantization, or another kernel, changes in a model's predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_fusedq.cli.options import (
    Activations,
    ActivationsOption,
    Dtype,
    ExperimentalOption,
    KernelOption,
    settings_section,
)
from vllm_fusedq.cli.output import (
    ExitCode,
    check_writable,
    console,
    positive_sizes,
    print_json,
    refusing,
    writing,
    writing_file,
)

if TYPE_CHECKING:
    from vllm_fusedq.measure.quality import OnProgress, Quality
    from vllm_fusedq.measure.tasks import TaskScore
    from vllm_fusedq.measure.texts import TextSet


def quality(
    model: Annotated[
        str, typer.Argument(help="a quantized checkpoint, or a repository of the hub: owner/name")
    ],
    against: Annotated[
        str,
        typer.Option(
            help="the model it was quantized from, another quantization of that, or 'stock': MODEL "
            "itself by stock vLLM"
        ),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help='NAME=FILE (.txt: one text; .jsonl: a "text" on each line) or a shipped set, '
            "python or english; may be repeated; both shipped ones by default"
        ),
    ] = None,
    max_length: Annotated[
        str, typer.Option(help="tokens of a window, or several: 512,32768; 512 by default")
    ] = "",
    tasks: Annotated[
        str, typer.Option(help="tasks of lm-evaluation-harness to run too: piqa,arc_easy")
    ] = "",
    task_folder: Annotated[
        Path | None, typer.Option(help="a folder with more tasks of lm-evaluation-harness")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: each checkpoint's own")] = Dtype.AUTO,
    kernel: KernelOption = "auto",
    activations: ActivationsOption = Activations.AUTO,
    experimental_device: ExperimentalOption = False,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="of both engines")
    ] = 1,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="part of the device that vLLM may use")
    ] = 0.8,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of MODEL's repository")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="exit code 1 where a set's mean KL is above")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(min=0, help="exit code 1 where a perplexity ratio is above"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    plot: Annotated[Path | None, typer.Option(help="a PNG file to write")] = None,
) -> None:
    """Compare MODEL's predictions with those of the model it was made from, on the same texts.

    Both run in vLLM's engine, one after the other, each in a process of its own. Texts are cut into
    windows that do not overlap; a window's first token is context alone.
    """
    if find_spec("vllm") is None:
        raise typer.BadParameter("vLLM is not installed, whose engine this runs; see the README")
    lengths = positive_sizes(max_length, "--max-length", least=2) if max_length else []
    wanted = [name for name in tasks.split(",") if name]
    settings = settings_section(kernel, activations, experimental_device)
    err = console(stderr=True)
    with refusing(err):
        from vllm_fusedq.measure.extras import require
        from vllm_fusedq.measure.quality import Engine, lengths_for, sides
        from vllm_fusedq.measure.quality import quality as run
        from vllm_fusedq.measure.quality_report import Limits, quality_json
        from vllm_fusedq.measure.tasks import run_tasks

        if plot is not None:
            require("matplotlib", "--plot", "bench")
            check_writable(plot)
        if wanted:
            require("lm_eval", "--tasks", "tasks")
        sets = _sets(texts or [])
        both = sides(model, against, revision, settings)
        lengths = lengths_for(both, lengths)
        engine = Engine(dtype.value, tensor_parallel_size, gpu_memory_utilization)
        with _progress() as on_progress:
            found = run(both, sets, lengths, engine, on_progress)
            scores = []
            if wanted:
                longest = max(lengths) if max_length else None
                scores = run_tasks(both, wanted, task_folder, engine, longest, on_progress)
        if plot is not None:
            from vllm_fusedq.measure.quality_figure import draw

            with writing_file(plot):
                draw(found, plot)
    exceeded = Limits(max_kl, max_ppl_ratio).exceeded(found)
    with writing():
        if as_json:
            print_json(quality_json(found, scores, exceeded))
        else:
            _print(found, scores)
        for sentence in exceeded:
            err.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(ExitCode.REFUSED if exceeded else ExitCode.FUSED)


def _sets(texts: list[str]) -> "list[TextSet]":
    from vllm_fusedq.measure.texts import SHIPPED, read_texts, shipped

    sets = []
    for each in texts or SHIPPED:
        name, named, file = each.partition("=")
        if not name or (not file and (named or name not in SHIPPED)):
            raise typer.BadParameter(
                f"--texts {each!r} is neither NAME=FILE nor one of {', '.join(SHIPPED)}"
            )
        if name in {found.name for found in sets}:
            raise typer.BadParameter(f"--texts names {name!r} twice")
        sets.append(read_texts(name, Path(file)) if file else shipped(name))
    return sets


@contextmanager
def _progress() -> "Iterator[OnProgress]":
    """A bar of windows for each side on stderr; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    err = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as bar:
        task = bar.add_task("reading tokenizers", total=None)

        def show(side: str, done: int, total: int) -> None:
            what = "scoring windows" if total else "starting its engine"
            bar.update(task, description=f"{side}: {what}", completed=done, total=total or None)

        yield show


def _print(found: "Quality", scores: "Sequence[TaskScore]") -> None:
    from vllm_fusedq.measure.quality_report import quality_table, summary, tasks_table

    out = console()
    out.print(quality_table(found))
    if scores:
        out.print(tasks_table(scores))
    out.print(summary(found), markup=False, highlight=False, soft_wrap=True)
