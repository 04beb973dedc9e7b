"""Runs lm-evaluation-harness's tasks in vLLM's engine, in a process of its own.

Answers `tasks.json`: a list of {"task", "metric", "value", "error"}, `error` its standard error.
"""

import json
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from vllm_fusedq.integration.devices import announced_device
from vllm_fusedq.measure.process import OnReport, answer


def main(request: dict[str, Any], folder: Path, report: OnReport) -> None:
    """`request`: "engine" (LLM's arguments), "tasks", "task_folder" (more tasks, or null)."""
    announced_device()
    report({"stage": "starting"})
    engine = dict(request["engine"])
    found = simple_evaluate(
        model="vllm",
        model_args={"pretrained": engine.pop("model"), "enforce_eager": True, **engine},
        tasks=request["tasks"],
        task_manager=TaskManager(include_path=request["task_folder"]),
        log_samples=False,
    )
    rows = [
        {"task": task, "metric": metric, "value": value, "error": _error(values, name, filter_)}
        for task, values in found["results"].items()
        for key, value in values.items()
        for metric, name, filter_ in [_metric(key)]
        if isinstance(value, int | float) and filter_ and not name.endswith("_stderr")
    ]
    (folder / "tasks.json").write_text(json.dumps(rows))


def _metric(key: str) -> tuple[str, str, str]:
    """The harness names a metric "name,filter"; filter "none" is no filter."""
    name, _, filter_ = key.partition(",")
    return (name if filter_ == "none" else key), name, filter_


def _error(values: dict[str, Any], name: str, filter_: str) -> float | None:
    found = values.get(f"{name}_stderr,{filter_}")
    return float(found) if isinstance(found, int | float) else None


if __name__ == "__main__":
    answer(main)
