"""What a soak calls wrong, leaking and left behind; `tests/engine/test_server.py` runs one."""

import itertools
import random
import secrets
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from local_server import Server, free_port, stop
from soaking import asks
from soaking.client import Answer, Fate
from soaking.kills import Kill, kills, left_behind, strike, wait_for
from soaking.memory import slope
from soaking.processes import Watch, family, resident_bytes
from soaking.verdict import compare, counts, difference

ALONE = Answer([5, 6, 7], [-0.5, -0.25, -1.0])


def test_the_slope_is_of_the_line_behind_the_warm_up() -> None:
    """3 MB a second of growth at first, then 2 MB a minute under noise of 1 MB."""
    rng = random.Random(0)
    samples = [(float(t), int(3e6 * t)) for t in range(100)]
    samples += [
        (float(t), int(300e6 + t / 60 * 2e6 + rng.uniform(-1e6, 1e6))) for t in range(100, 400)
    ]
    assert slope(samples, warm_up=0.25) == pytest.approx(2, abs=0.1)
    assert slope(samples, warm_up=0) > 10
    assert slope(samples[:1], warm_up=0) == 0


@pytest.mark.parametrize(
    ("found", "tolerance", "expected"),
    [
        (Answer([5, 6, 7], [-0.5, -0.25, -1.0]), 0.0, (None, False)),
        (Answer([5], [-0.5], Fate.CANCELLED), 0.0, (None, False)),
        (Answer([5, 8, 7], [-0.5, -0.25, -1.0]), 0.0, ("token 1 is 8, alone 6", False)),
        (Answer([5, 8, 7], [-0.5, -0.26, -9.0]), 0.1, (None, True)),
        (
            Answer([5, 6, 7], [-0.5, -0.25, -1.001]),
            0.0,
            ("log-probability 2 is -1.001, alone -1.0", False),
        ),
        (Answer([5, 6, 7], [-0.5, -0.25, -1.001]), 0.1, (None, False)),
        (
            Answer([5, 6, 7], [-0.7, -0.25, -1.0]),
            0.1,
            ("log-probability 0 is -0.7, alone -0.5", False),
        ),
        (Answer([5, 6, 7, 1], [-0.5, -0.25, -1.0, 0.0]), 0.1, ("4 tokens, alone 3", False)),
    ],
)
def test_what_is_wrong(found: Answer, tolerance: float, expected: tuple[str | None, bool]) -> None:
    assert difference(found, ALONE, tolerance) == expected


def test_lost_and_wrong_requests_are_named_and_ties_are_few() -> None:
    ask = asks.Ask((3, 4), 3, seed=9)
    sent = asks.Sent(ask, True, None, None)
    right = [(sent, ALONE)] * 399
    tied = (sent, Answer([5, 9, 7], ALONE.logprobs))
    lost = (sent, Answer(fate=Fate.LOST, detail="ReadError: "))
    assert compare([*right, tied], {ask: ALONE}) == (
        [],
        ["request 399 (2 + 3 tokens, seed 9): token 1 is 9, alone 6"],
        0,
    )
    assert compare([*right, tied, lost], {ask: ALONE}, 0.1) == (["request 400: ReadError: "], [], 1)
    assert compare([*right[:100], tied, tied], {ask: ALONE}, 0.1)[1] == [
        "2 ties in 306 tokens, more than rounding explains"
    ]


def test_the_requests_are_of_every_kind_and_come_again() -> None:
    pool = asks.pool(1, 96)
    sent = list(itertools.islice(asks.load(2, pool), 3000))
    assert sent == list(itertools.islice(asks.load(2, asks.pool(1, 96)), 3000))
    assert {len(each.ask.prompt) for each in sent} == {*asks.PROMPT_TOKENS}
    assert {each.ask.max_tokens for each in sent} == {*asks.OUTPUT_TOKENS}
    assert max(asks.PROMPT_TOKENS) + max(asks.OUTPUT_TOKENS) <= asks.MODEL_LENGTH
    found = counts([(each, Answer()) for each in sent])
    assert found["sent"] == 3000
    for kind, share in (("streamed", 2), ("greedy", 2), ("told_to_cancel", 3)):
        assert found[kind] == pytest.approx(3000 / share, rel=0.1)


def test_every_strike_meets_a_server_that_loads_and_one_that_serves() -> None:
    found = kills(7, 10, compiling=True)
    assert found[0].moment == "compiling"
    assert len({*found}) == 11
    assert [each.moment for each in found[1:]] == ["loading", "serving"] * 5
    assert found == kills(7, 10, compiling=True) != kills(8, 10, compiling=True)
    assert len(kills(7, 2, compiling=False)) == 2


UNTIDY = """
    import os, socket, subprocess, sys, time
    from multiprocessing import resource_tracker, shared_memory

    left, temporary, port = sys.argv[1:]
    memory = shared_memory.SharedMemory(left, create=True, size=4096)
    resource_tracker.unregister(memory._name, "shared_memory")
    for name in ("half", "torchinductor_me", "1b6c3110-b905-4284-ba2e-90ed9072060b"):
        open(os.path.join(temporary, name), "w").close()
    sock = socket.socket()
    sock.bind(("127.0.0.1", int(port)))
    sock.listen()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_server_leaves_is_found_and_removed(tmp_path: Path) -> None:
    """A child that outlives it, a shared memory, a file; nothing of it is left after that."""
    temporary, name, port = tmp_path / "tmp", f"soak-test-{secrets.token_hex(8)}", free_port()
    temporary.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(UNTIDY), name, str(temporary), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", tmp_path / "log", process)
    watch = Watch(process.pid, every=0.01)
    watch.start()
    try:
        child = int(process.stdout.readline())
        wait_for(lambda: watch.shared_memory, 30)
        assert resident_bytes(process.pid) > 1e6
        assert {process.pid, child} <= {each.pid for each in family(process.pid)}
        strike(server, Kill("serving", "server", signal.SIGKILL))
        left = left_behind(server, watch, [temporary], seconds=1)
    finally:
        stop(process)
    process.stdout.close()
    assert left.files == [f"/dev/shm/{name}", "tmp/half"]
    assert [each.split()[0] for each in left.processes] == [str(child)]
    assert left.by_vllm == ["tmp/1b6c3110-b905-4284-ba2e-90ed9072060b"]
    assert not left.port_taken
    assert len(left.problems) == 3
    assert not Path("/dev/shm", name).exists()
    assert [path.name for path in temporary.iterdir()] == ["torchinductor_me"]
    wait_for(lambda: not psutil.pid_exists(child), 30)
