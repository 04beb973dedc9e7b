"""Named sets of texts: files of the user's, and the two that are shipped."""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from vllm_fusedq.errors import ComparisonError

SHIPPED = ("python", "english")
SUFFIXES = (".jsonl", ".txt")


class TextSet(NamedTuple):
    """Texts that are reported together, under `name`."""

    name: str
    texts: tuple[str, ...]


def shipped(name: str) -> TextSet:
    """One of `SHIPPED`: Python code, or English prose (sets/README.md says whose)."""
    file = files("vllm_fusedq.measure") / "sets" / f"{name}.txt"
    return TextSet(name, (file.read_text(encoding="utf-8"),))


def read_texts(name: str, path: Path) -> TextSet:
    """A set from a file: .txt is one text; .jsonl has an object with a "text" on each line.

    Raises:
        ComparisonError: another kind of file, one that cannot be read, or a text that is empty.
    """
    if path.suffix not in SUFFIXES:
        raise ComparisonError(
            f"texts {name!r}: {path} is neither {' nor '.join(SUFFIXES)}; .txt is one text, .jsonl "
            'has {"text": "..."} on each line'
        )
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ComparisonError(
            f"texts {name!r}: {path} cannot be read: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise ComparisonError(f"texts {name!r}: {path} is not UTF-8: {error}") from error
    texts = tuple(_lines(name, path, content)) if path.suffix == ".jsonl" else (content,)
    _check_filled(name, path, texts)
    return TextSet(name, texts)


def _lines(name: str, path: Path, content: str) -> Iterator[str]:
    # Not splitlines: JSON strings may hold separators of other standards
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ComparisonError(
                f"texts {name!r}: line {number} of {path} is not JSON: {error}"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise ComparisonError(
                f'texts {name!r}: line {number} of {path} is no object with a string "text"'
            )
        yield value["text"]


def _check_filled(name: str, path: Path, texts: Sequence[str]) -> None:
    empty = next((i for i, text in enumerate(texts, 1) if not text.strip()), None)
    if not texts or empty is not None:
        where = f"text {empty} of {path}" if texts else str(path)
        raise ComparisonError(f"texts {name!r}: {where} is empty; give texts to compare on")
