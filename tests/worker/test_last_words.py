"""A worker's refusal is printed last by the process that the user started."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PARENT = """
import sys
from pathlib import Path
from vllm_fusedq.errors import PreflightError, Problem, UnsupportedCheckpoint
from vllm_fusedq.worker.last_words import name_message_file, speaking_last

file = name_message_file()
print(Path(file).exists())
for error in (PreflightError([Problem("a.b", "x", "y", "z")]), UnsupportedCheckpoint("second")):
    try:
        with speaking_last(file):
            raise error
    except RuntimeError:
        print("raised", file=sys.stderr)
print(file)
raise SystemExit("a traceback would stand here")
"""


def test_first_refusal_is_printed_after_everything_else_and_the_file_is_removed() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert done.stderr.startswith("raised\nraised\n")
    assert done.stderr.rstrip().endswith(
        "a traceback would stand here\n\n"
        "vllm-fusedq refused to serve this checkpoint.\n"
        "PreflightError: 1 problem in this checkpoint:\n"
        "  - a.b: found x; supported: y; z"
    )
    existed, file = done.stdout.split()
    assert existed == "False", "a process that is killed would leave it behind"
    assert not Path(file).exists()


def test_no_temporary_directory_is_no_reason_to_die(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_fusedq.errors import UnsupportedCheckpoint
    from vllm_fusedq.worker.last_words import name_message_file, speaking_last

    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    for file in (name_message_file(), None):
        with pytest.raises(UnsupportedCheckpoint), speaking_last(file):
            raise UnsupportedCheckpoint("still raised")
