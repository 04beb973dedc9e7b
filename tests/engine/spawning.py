"""Lets `multiprocessing` spawn by forking a copy of this process as it was when vLLM was imported.

A spawned process begins by importing vLLM anew, seven seconds of a core. A copy that was forked
before anything ran, without threads, stands for the new interpreter; all else, from the pickled
arguments to the open files, reaches it as `spawn` says.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from ctypes import CDLL
from multiprocessing import util
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_MOST_FDS = 16
_LAST_FD = 1024
_SIZE = 8


def fork_when_spawning() -> None:
    """From here on a spawned process of this one is forked from a copy made now."""
    requests, served = socket.socketpair()
    # An interrupt of the process group is for this process, not for its copy.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if os.fork() == 0:
        requests.close()
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        _serve(served, interrupted)
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    served.close()
    # The copy's grandchildren become children of this process, which waits for them as for its own.
    CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    execute = util.spawnv_passfds

    def spawn(path: bytes, args: list, passfds: list[int]) -> int:
        if "--multiprocessing-fork" not in args:
            return execute(path, args, passfds)
        fds = sorted({0, 1, 2, *passfds})
        code = args[args.index("-c") + 1]
        request = json.dumps({"code": code, "env": dict(os.environ), "fds": fds}).encode()
        socket.send_fds(requests, [len(request).to_bytes(_SIZE, "little")], fds)
        requests.sendall(request)
        return int.from_bytes(_receive(requests, _SIZE), "little")

    util.spawnv_passfds = spawn


def become(env: dict[str, str]) -> None:
    """Take this environment, and of it what torch has read when it was imported."""
    os.environ.clear()
    os.environ.update(env)
    if dynamo := sys.modules.get("torch._dynamo.config"):
        dynamo.disable = env.get("TORCHDYNAMO_DISABLE") == "1"


def status_of(run: Callable[[], object]) -> int:
    """The exit code of an interpreter that does nothing but `run`; prints what it raises."""
    try:
        run()
    except SystemExit as exited:
        if exited.code is None or isinstance(exited.code, int):
            return exited.code or 0
        print(exited.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    else:
        return 0
    return 1


def leave(code: int) -> NoReturn:
    """End a forked process as an interpreter ends: threads, exit functions, streams."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _serve(connection: socket.socket, interrupted: Any) -> NoReturn:
    """Fork for each request until the other end is closed; forks are `interrupted` as before."""
    while True:
        size, fds, _, _ = socket.recv_fds(connection, _SIZE, _MOST_FDS)
        if not size:
            os._exit(0)
        request = json.loads(_receive(connection, int.from_bytes(size, "little")))
        reading, writing = os.pipe()
        # Twice, so that the second is nobody's child when the first has ended.
        first = os.fork()
        if first == 0:
            second = os.fork()
            if second == 0:
                signal.signal(signal.SIGINT, interrupted)
                _spawned(request, fds)
            os.write(writing, second.to_bytes(_SIZE, "little"))
            os._exit(0)
        os.waitpid(first, 0)
        connection.sendall(os.read(reading, _SIZE))
        for fd in (reading, writing, *fds):
            os.close(fd)


def _spawned(request: dict, received: list[int]) -> NoReturn:
    """Run what the new interpreter would have run, with its environment and open files."""
    become(request["env"])
    wanted = request["fds"]
    first = _LAST_FD - len(wanted)
    for number, fd in enumerate(received):
        os.dup2(fd, first + number)
    os.closerange(3, first)
    for number, fd in enumerate(wanted):
        os.dup2(first + number, fd)
    os.closerange(first, _LAST_FD)
    sys.argv = ["-c", "--multiprocessing-fork"]
    fork_when_spawning()
    leave(status_of(lambda: exec(request["code"], {"__name__": "__main__"})))
