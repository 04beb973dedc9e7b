"""Work in a process of its own: what it says arrives, and nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vllm_fusedq.errors import EngineError
from vllm_fusedq.measure import process
from vllm_fusedq.measure.process import run_apart

SUPPORT = Path(__file__).resolve().parents[1] / "support"
RUN = """
import json, sys
from pathlib import Path
from vllm_fusedq.measure import process
process._PATIENCE = 0.2
say = lambda content: print(json.dumps(content), flush=True)
process.run_apart("measured_child", "a model", {"do": "hang"}, Path(sys.argv[1]), say)
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))


def test_reports_and_the_answer_arrive(tmp_path: Path) -> None:
    said = []
    run_apart("measured_child", "a model", {"do": "nothing"}, tmp_path, said.append)
    assert (tmp_path / "answer").read_text() == "nothing"
    (first,) = said
    # A session of its own: Ctrl-C in a terminal reaches it through us alone
    assert first["session"] == first["pid"] != os.getsid(0)
    assert not psutil.pid_exists(first["pid"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"do": "die"}, "a model: its process was killed by SIGKILL, as a machine without memory"),
        ({"do": "exit"}, "a model: its process ended with exit code 3"),
        (
            {"do": "raise", "type": "CheckpointError", "message": "no config\nthere"},
            "a model: no config\nthere",
        ),
        (
            {"do": "raise", "type": "OddError", "message": "it is odd\nvery"},
            "a model: OddError: it is odd;",
        ),
        (
            {"do": "raise", "type": "ValueError", "message": "No available memory for the cache"},
            "a model: does not fit the device's memory: No available memory for the cache; lower "
            "--max-length, raise -tp",
        ),
        (
            {"do": "raise", "type": "OutOfMemoryError", "message": "tried 3 GiB"},
            "does not fit the device's memory: tried 3 GiB",
        ),
        ({"do": "raise", "type": "OddError", "message": ""}, "a model: OddError: OddError"),
    ],
)
def test_how_it_ended_is_told(tmp_path: Path, request_: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError) as raised:
        run_apart("measured_child", "a model", request_, tmp_path, lambda content: None)
    assert message in str(raised.value)
    log = Path(str(raised.value).rpartition("all that it printed: ")[2])
    assert "said by the child" in log.read_text()
    log.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """Not even one that its child started, nor a child that ignores Ctrl-C."""
    logs = tmp_path / "logs"
    logs.mkdir()
    command, env = [sys.executable, "-c", RUN, str(tmp_path)], {**os.environ, "TMPDIR": str(logs)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, **options) as parent:
        assert parent.stdout is not None
        pids = [json.loads(parent.stdout.readline())["pid"]]
        pids.append(json.loads(parent.stdout.readline())["grandchild"])
        assert all(map(psutil.pid_exists, pids))
        parent.send_signal(number)
        assert parent.wait(30) != 0
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))
    assert not list(logs.iterdir())


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_cpu_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert process._environment()["VLLM_CPU_KVCACHE_SPACE"] == "7"
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert process._environment()["VLLM_CPU_KVCACHE_SPACE"] == "1"
