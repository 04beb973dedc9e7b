"""Tasks of lm-evaluation-harness with a model and its reference, each in an engine of its own."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_fusedq.measure.process import run_apart
from vllm_fusedq.measure.quality import Engine, OnProgress, Side, engine_arguments

TASKS = "vllm_fusedq.integration.tasks"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task on both sides, with the standard errors that the harness gives."""

    task: str
    metric: str
    reference: float
    model: float
    reference_error: float | None
    model_error: float | None


def run_tasks(
    both: tuple[Side, Side],
    tasks: Sequence[str],
    task_folder: Path | None,
    engine: Engine,
    max_length: int | None,
    on_progress: OnProgress,
) -> list[TaskScore]:
    """Every metric of the tasks, `both` being (model, reference).

    Args:
        task_folder: holds more tasks than the harness's own, or None.
        max_length: tokens of a sequence; None: the model's own.

    Raises:
        EngineError: an engine or the harness ends early, as where a task's data is not at hand.
    """
    model, reference = (
        _scores(side, tasks, task_folder, engine, max_length, on_progress) for side in both
    )
    shared = [key for key in model if key in reference]
    return [
        TaskScore(
            *key,
            reference=reference[key]["value"],
            model=model[key]["value"],
            reference_error=reference[key]["error"],
            model_error=model[key]["error"],
        )
        for key in shared
    ]


def _scores(
    side: Side,
    tasks: Sequence[str],
    task_folder: Path | None,
    engine: Engine,
    max_length: int | None,
    on_progress: OnProgress,
) -> dict[tuple[str, str], dict[str, Any]]:
    arguments = engine_arguments(side, engine)
    if max_length is not None:
        arguments["max_model_len"] = max_length
    on_progress(side.name, 0, 0)
    with tempfile.TemporaryDirectory(prefix="fusedq-tasks-") as folder:
        request = {
            "engine": arguments,
            "tasks": list(tasks),
            "task_folder": str(task_folder) if task_folder else None,
        }
        run_apart(TASKS, side.name, request, Path(folder), lambda content: None)
        rows = json.loads((Path(folder) / "tasks.json").read_text())
    return {(row["task"], row["metric"]): row for row in rows}
