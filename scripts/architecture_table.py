"""Writes the table of docs/models.md from a run of every architecture in an engine.

    pytest tests/engine/test_model_code.py --all-models --junitxml RUN.xml
    python scripts/architecture_table.py RUN.xml...

Rows of models that no run has stay; a later run replaces those of an earlier one.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = """\
| model | transformers' class | weights | fused layers | one rank | two ranks |
| --- | --- | --- | --- | --- | --- |
"""
APART = " (*)"
LIMIT = 0.002
"""Above this difference of vLLM's unquantized model from transformers' a model gets `APART`."""


def records(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """What each test of an architecture that passed has recorded."""
    return [
        json.loads(each.attrib["value"])
        for run in runs
        for case in ElementTree.parse(run).iter("testcase")
        if case.find("failure") is None and case.find("error") is None
        for each in case.iter("property")
        if each.attrib["name"] == "architecture"
    ]


def row(record: dict[str, Any]) -> str:
    """One line; differences in nats."""
    if record.get("refused"):
        results = "refused by name | | "
    elif record.get("fails"):
        results = f"vLLM without the plugin: `{record['fails']}` | | "
    else:
        ranks = [record["ranks"].get(size) for size in ("1", "2")]
        shown = ["" if each is None else f"{each:.4f}" for each in ranks]
        results = f"{record['layers']} | {' | '.join(shown)} "
    name = record["name"] + (APART if record.get("apart", 0) > LIMIT else "")
    return f"| {name} | {record['class']} | {record['build']} | {results}|\n"


def table_of(text: str) -> tuple[int, int, dict[str, str]]:
    """Where the table's rows begin and end in the page, and each by the name of its model."""
    start = text.index(HEAD) + len(HEAD)
    lines = []
    for line in text[start:].splitlines(keepends=True):
        if not line.startswith("|"):
            break
        lines.append(line)
    rows = {line.split("|")[1].strip().removesuffix(APART): line for line in lines}
    return start, start + sum(map(len, lines)), rows


def with_rows(text: str, found: Iterable[dict[str, Any]]) -> str:
    """`text` with these rows in its table; raises ValueError where it has none."""
    start, stop, rows = table_of(text)
    rows |= {record["name"]: row(record) for record in found}
    return text[:start] + "".join(rows[name] for name in sorted(rows)) + text[stop:]


def main() -> None:
    PAGE.write_text(with_rows(PAGE.read_text(), records(map(Path, sys.argv[1:]))))


if __name__ == "__main__":
    main()
