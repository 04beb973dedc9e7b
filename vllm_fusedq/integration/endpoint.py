"""`GET /fusedq/plan` and `/fusedq/health`, and the plan as Prometheus metrics.

Loaded by vLLM's endpoint-plugin group when VLLM_PLUGINS names `fusedq`. On a vLLM without that
group nothing loads it, and the rest of the package works.
"""

import functools
from argparse import Namespace
from collections import Counter
from typing import Any

import prometheus_client
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import Gauge

from vllm_fusedq.integration.worker_methods import REPORT_METHOD

RPC_SECONDS = 30.0

router = APIRouter(prefix="/fusedq")


class FusedQEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = "fusedq"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine client, and fill the metrics once: a plan does not change."""
        state.fusedq_engine = None
        config = getattr(engine_client, "model_config", None)
        if config is None or config.quantization != self.name:
            return
        state.fusedq_engine = engine_client
        fill_metrics(await _reports(engine_client))


@router.get("/plan")
async def plan(request: Request) -> JSONResponse:
    """Every rank's live report, in the order of the ranks."""
    engine = request.app.state.fusedq_engine
    if engine is None:
        return _not_fusedq()
    return JSONResponse({"ranks": await _reports(engine)})


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 where every rank answers and runs every quantized layer fused."""
    engine = request.app.state.fusedq_engine
    if engine is None:
        return _not_fusedq()
    try:
        reports = await _reports(engine)
    except Exception as error:
        detail = f"the workers do not answer: {type(error).__name__}: {error}"
        return JSONResponse({"status": "unhealthy", "detail": detail}, 503)
    counts = [report["counts"] for report in reports]
    healthy = all(each["fused"] and not each["fallbacks"] for each in counts)
    content = {"status": "healthy" if healthy else "unhealthy", "ranks": counts}
    return JSONResponse(content, 200 if healthy else 503)


async def _reports(engine: Any) -> list[dict[str, Any]]:
    return await engine.collective_rpc(REPORT_METHOD, timeout=RPC_SECONDS)


def _not_fusedq() -> JSONResponse:
    detail = "this server does not run --quantization fusedq"
    return JSONResponse({"status": "absent", "detail": detail}, 404)


def fill_metrics(reports: list[dict[str, Any]]) -> None:
    """Count the layers of the model once, and the bytes of all ranks."""
    layers, sizes = Counter[str](), Counter[str]()
    for report in reports:
        for row in report["layers"]:
            sizes.update(row["bytes"])
            if report["rank"]["tensor"] == 0:
                layers[row["kernel"]] += row["count"]
    layer_gauge, size_gauge = _metrics()
    for gauge, values in ((layer_gauge, layers), (size_gauge, sizes)):
        gauge.clear()
        for label, value in values.items():
            gauge.labels(label).set(value)


@functools.cache
def _metrics() -> tuple[Gauge, Gauge]:
    """The gauges, registered once in the registry that vLLM's /metrics shows."""
    prometheus_client.Counter("fusedq_fallbacks", "Quantized layers that do not run fused")
    return (
        Gauge("fusedq_layers", "Fused layers", ["kernel"], multiprocess_mode="mostrecent"),
        Gauge("fusedq_weight_bytes", "Resident bytes", ["kind"], multiprocess_mode="mostrecent"),
    )
