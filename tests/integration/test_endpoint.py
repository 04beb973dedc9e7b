"""The HTTP routes where the engine does not give a plan; tests/engine/ asks them of a real one."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_fusedq.integration.endpoint import FusedQEndpoint

COUNTS = {"fused": 8, "unquantized": 1, "fallbacks": 0}


class Engine:
    """As much of vLLM's engine client as the plugin uses; `counts` None: the workers are gone."""

    def __init__(self, quantization: str | None, counts: dict[str, int] | None) -> None:
        self.model_config = SimpleNamespace(quantization=quantization)
        self.counts = counts

    async def collective_rpc(self, method: str, timeout: float) -> list[dict[str, Any]]:
        if self.counts is None:
            raise TimeoutError("no answer")
        return [{"counts": self.counts, "layers": [], "rank": {"tensor": 0}}]


def client(engine: Engine | None) -> TestClient:
    app, plugin = FastAPI(), FusedQEndpoint()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, Namespace()))
    return TestClient(app)


@pytest.mark.parametrize("engine", [None, Engine("awq", COUNTS)], ids=["render", "stock"])
@pytest.mark.parametrize("path", ["/fusedq/plan", "/fusedq/health"])
def test_a_server_without_fusedq_says_so(engine: Engine | None, path: str) -> None:
    answer = client(engine).get(path)
    assert answer.status_code == 404
    assert answer.json()["detail"] == "this server does not run --quantization fusedq"


def test_workers_that_do_not_answer_are_unhealthy() -> None:
    engine = Engine("fusedq", COUNTS)
    ask = client(engine)
    assert ask.get("/fusedq/health").status_code == 200
    engine.counts = None
    answer = ask.get("/fusedq/health")
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "unhealthy",
        "detail": "the workers do not answer: TimeoutError: no answer",
    }


@pytest.mark.parametrize("counts", [{**COUNTS, "fused": 0}, {**COUNTS, "fallbacks": 1}])
def test_anything_but_fused_layers_is_unhealthy(counts: dict[str, int]) -> None:
    answer = client(Engine("fusedq", counts)).get("/fusedq/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "unhealthy", "ranks": [counts]}
