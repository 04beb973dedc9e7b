"""Writes the README's table of supported checkpoints from the registry of formats.

    python scripts/support_table.py [--check]

Each format says in `support` what it reads, composed from the constants that it checks with.
`--check` writes nothing and fails where the table is not up to date.
"""

import sys
from pathlib import Path

from vllm_fusedq.formats import FORMATS

README = Path(__file__).resolve().parent.parent / "README.md"
HEAD = "| checkpoint | weights | groups | zero points |\n| --- | --- | --- | --- |\n"


def table() -> str:
    """The table in Markdown, a row per `Support` of each format."""
    rows = [row for known in FORMATS.values() for row in known.support]
    return HEAD + "".join(
        f"| {row.checkpoint} | {row.weights} | {row.groups} | {row.zero_points} |\n" for row in rows
    )


def with_table(text: str) -> str:
    """`text` with its table replaced; raises ValueError where it has none."""
    start = text.index(HEAD)
    # A table ends with the first line that is none of its own
    stop = text.index("\n\n", start) + 1
    return text[:start] + table() + text[stop:]


def main() -> None:
    text = README.read_text()
    written = with_table(text)
    if "--check" in sys.argv[1:]:
        if written != text:
            sys.exit("README.md is not up to date: run python scripts/support_table.py")
        return
    README.write_text(written)


if __name__ == "__main__":
    main()
