"""Forks that stand for new processes: a script's own, and those that it spawns."""

import json
import os
from pathlib import Path

import pytest

import preloaded
from preloaded import run_script
from test_plugin import result

pytestmark = pytest.mark.engine

SCRIPT = """
import atexit, json, multiprocessing, os, sys

def child(connection):
    atexit.register(print, "the child left")
    known = "vllm" in sys.modules, "SCRIPT" in globals()
    connection.send([*known, os.environ["LATE"], os.getppid()])
    sys.exit(3)

if __name__ == "__main__":
    atexit.register(print, "the script left")
    before, SCRIPT = "vllm" in sys.modules, sys.argv[1]
    os.environ["LATE"] = "set"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there,))
    process.start()
    *found, parent = here.recv()
    process.join()
    found += [parent == os.getpid(), process.exitcode, "PATH" in os.environ]
    print("RESULT " + json.dumps([before, SCRIPT, *found]))
    sys.exit(5)
"""


def test_what_a_script_spawns_is_a_fork_that_knows_what_spawn_says(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    assert run_script(script, ["argument"], {"EARLY": "set"}, log) == 5
    printed = log.read_text()
    assert json.loads(result(printed)) == [True, "argument", True, False, "set", True, 3, False]
    assert printed.index("the child left") < printed.index("the script left")


def test_a_script_that_raises_or_hangs(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text("raise ValueError('as said')")
    assert run_script(script, [], {}, log) == 1
    assert log.read_text().endswith("ValueError: as said\n")
    script.write_text("import time; print('began', flush=True); time.sleep(60)")
    with pytest.raises(TimeoutError, match=r"after 1 s\n(.*\n)*began"):
        run_script(script, [], {}, log, timeout=1)


def test_a_started_script_is_interrupted_as_a_group(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text("import time; print('began', flush=True); time.sleep(60)")
    process = preloaded.start([str(script)], log, {})
    while not (log.exists() and "began" in log.read_text()):
        assert process.poll() is None
    os.killpg(process.pid, 2)
    assert process.wait(30) == 1
