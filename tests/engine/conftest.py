"""Real engines and servers, shared per module because each takes half a minute to start."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import local_server
import preloaded
from deployed import environment, on_this_machine, service
from engines import SMALL_CACHE
from local_server import Server, compile_arguments, serving
from soaking.kills import Kill, left_behind, strike
from soaking.processes import Watch
from tiny_models import CHECKPOINTS, asset

DEPLOYED = "tiny-llama-gptq-g128"

# Parallel test processes keep to a core each: by itself every engine would take the first one.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and (os.cpu_count() or 1) > 1:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % os.cpu_count())


@pytest.fixture(scope="module", params=CHECKPOINTS)
def served(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[tuple[str, Server]]:
    """Every committed quantized checkpoint behind `vllm serve`, torch.compile on.

    One is served as `deploy/` serves a model on a CPU: with that command's options and environment,
    and in processes that import vLLM themselves; a worker of it is killed at the end.
    """
    name = request.param
    log = tmp_path_factory.mktemp(name) / "server.log"
    arguments = ["--quantization=fusedq"]
    if name == DEPLOYED:
        arguments = on_this_machine(service("cpu")["command"], "--host", "--port")
    arguments += ["--served-model-name", "tiny", "--max-model-len", "512"]
    arguments += [*compile_arguments(), *SMALL_CACHE]
    settings = {"fusedq": {"report": str(log.with_name("plan.json"))}}
    arguments += ["--additional-config", json.dumps(settings)]
    env = {"VLLM_PLUGINS": "fusedq"}
    if name == DEPLOYED:
        env = environment("cpu") | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    start = local_server.start if name == DEPLOYED else preloaded.start
    with serving(asset(name), log, arguments, start=start, **env) as server:
        if name != DEPLOYED:
            yield name, server
            return
        watch = Watch(server.process.pid, every=2)
        watch.start()
        yield name, server
        strike(server, Kill("serving", "worker", signal.SIGKILL))
        left = left_behind(server, watch, [])
    assert not left.problems


@pytest.fixture(scope="session")
def scripts() -> Path:
    return Path(__file__).parent / "scripts"
