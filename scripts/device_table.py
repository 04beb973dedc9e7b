"""Writes the tables of docs/devices.md from the boards that planning knows.

    python scripts/device_table.py [--check]

`--check` writes nothing and fails where they are not up to date.
"""

import sys
from pathlib import Path

from fusedq_kernels.choose.boards import BOARDS, Board
from fusedq_kernels.choose.device import MIN_CAPABILITY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "devices.md"
HEAD = (
    "| `--device` | architecture | SMs | shared memory per block, KiB | memory, GiB "
    "| bandwidth, GB/s | source |\n| --- | --- | --- | --- | --- | --- | --- |\n"
)


def row(board: Board) -> str:
    architecture = board.arch or "sm_{}{}".format(*board.capability)
    if board.arch:
        architecture += ", by consent: never run"
    elif board.capability < MIN_CAPABILITY:
        architecture += ", refused: too old"
    smem = board.device.smem_per_block >> 10
    cells = (architecture, board.num_sms, smem, f"{board.memory / 1024:.1f}", board.bandwidth)
    return f"| {board.name} | {' | '.join(map(str, cells))} | {board.source} |\n"


def with_table(text: str) -> str:
    """`text` with its table replaced; raises ValueError where it has none."""
    start = text.index(HEAD)
    # A table ends with the first line that is none of its own
    stop = text.index("\n\n", start) + 1
    return text[:start] + HEAD + "".join(map(row, BOARDS.values())) + text[stop:]


def main() -> None:
    text = PAGE.read_text()
    written = with_table(text)
    if "--check" in sys.argv[1:]:
        if written != text:
            sys.exit("docs/devices.md is not up to date: run python scripts/device_table.py")
        return
    PAGE.write_text(written)


if __name__ == "__main__":
    main()
