"""Two pipeline stages on one CPU: each loads, and reports, its half of the plan.

No tokens here: vLLM's CPU runner has no buffer for what a stage hands on (AssertionError in
`sync_and_gather_intermediate_tensors`, in 0.32), whatever the quantization.
"""

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import preloaded
from engines import SMALL_CACHE, get
from local_server import Server, serving
from tiny_models import asset
from vllm_fusedq.cli import app

pytestmark = pytest.mark.engine

NAME = "tiny-llama-gptq-g128"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A server of two stages, and the folder of its reports."""
    folder = tmp_path_factory.mktemp("staged")
    settings = {"fusedq": {"report": str(folder / "plan.json")}}
    arguments = ["--quantization", "fusedq", "--enforce-eager", *SMALL_CACHE]
    arguments += ["--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp"]
    arguments += ["--max-model-len", "256", "--additional-config", json.dumps(settings)]
    env = {"VLLM_PLUGINS": "fusedq", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    log = folder / "server.log"
    with serving(asset(NAME), log, arguments, start=preloaded.start, **env) as server:
        yield folder, server


def checked() -> list[dict]:
    """What `fusedq check` says of every layer."""
    done = CliRunner().invoke(app, ["check", str(asset(NAME)), "--device", "cpu", "--json"])
    return json.loads(done.stdout)["results"][0]["layers"]


def kinds(rows: list[dict]) -> Counter:
    """How many layers of each kind: everything that a plan says of one layer but its index."""
    counts = Counter()
    for row in rows:
        kind = {name: value for name, value in row.items() if name not in ("layers", "count")}
        kind["bytes"] = {name: size // row["count"] for name, size in row["bytes"].items()}
        kind["name"] = row["layers"].rpartition(".")[2].partition(" ")[0]
        counts[json.dumps(kind, sort_keys=True)] += row["count"]
    return counts


def test_the_stages_together_run_what_check_says(staged: tuple[Path, Server]) -> None:
    folder, server = staged
    reports = get(server, "/fusedq/plan")["ranks"]
    assert [report["rank"]["pipeline"] for report in reports] == [0, 1]
    assert [report["counts"]["fused"] for report in reports] == [4, 4]
    written = [json.loads((folder / f"plan{stage}.json").read_text()) for stage in ("", ".stage1")]
    assert [each["layers"] for each in written] == [report["layers"] for report in reports]
    for stage, report in enumerate(reports):
        assert all(f".layers.{stage}." in row["layers"] for row in report["layers"])

    found = sum((kinds(report["layers"]) for report in reports), Counter())
    assert found == kinds(checked())


def test_every_stage_is_healthy_and_every_layer_counted(staged: tuple[Path, Server]) -> None:
    _, server = staged
    health = get(server, "/fusedq/health")
    assert health["status"] == "healthy"
    assert [each["fused"] for each in health["ranks"]] == [4, 4]
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    assert 'fusedq_layers{kernel="cpu-fused"} 8.0' in metrics
