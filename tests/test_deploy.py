"""deploy/: what the tools that will read its files make of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployed import DEPLOY, MANIFESTS, VALUES, container, service
from vllm_parser import parse

CONFIGS = DEPLOY.parent / "serving_configs"
# What is started, and the serving config that says why; the values' is rendered by the chart.
SERVED = {"cpu": "cpu-qwen2.5-0.5b-gptq.yaml", "cuda": "l4-qwen2.5-7b-gptq.yaml"}
CHART = os.environ.get("FUSEDQ_PRODUCTION_STACK_CHART")


def tool(name: str) -> str:
    """A linter that the extra `dev` installs where there is a build of it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no build of {name} for this machine")
    return found


def test_the_dockerfile_is_linted() -> None:
    command = [tool("hadolint"), "--failure-threshold", "style", str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_the_context_holds() -> None:
    """A wheel needs more than the packages; what .dockerignore leaves out is not there."""
    kept = [
        line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().split() if line[0] == "!"
    ]
    assert all((DEPLOY.parent / name).exists() for name in kept)
    assert {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"} <= {*kept}


def test_every_image_has_the_vllm_that_make_installs() -> None:
    install = (DEPLOY.parent / "scripts" / "install.sh").read_text()
    (version,) = re.findall(r"VLLM_VERSION:-([\d.]+)", install)
    assert f"\nARG VLLM=v{version}\n" in (DEPLOY / "Dockerfile").read_text()
    for path in VALUES:
        (model,) = yaml.safe_load(path.read_text())["servingEngineSpec"]["modelSpec"]
        assert model["tag"] == f"v{version}"


def compose(*profiles: str) -> dict[str, Any]:
    """compose.yaml as Docker Compose reads it."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    command = [tool("docker-compose"), "-f", str(DEPLOY / "compose.yaml"), *chosen]
    done = subprocess.run([*command, "config", "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


@pytest.mark.parametrize("name", SERVED)
def test_compose_starts_what_kubernetes_starts(name: str) -> None:
    (found,) = compose(name).values()
    pod = container(name)
    assert found["command"] == service(name)["command"] == pod["args"]
    assert found["image"] == pod["image"]
    assert Path(found["build"]["context"]) == DEPLOY.parent
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f" AS {found['build']['target']}\n" in dockerfile
    values = {each["name"]: each.get("value") for each in pod["env"]}
    assert found["environment"].items() - {("HF_TOKEN", "")} <= values.items()


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_keep_to_the_schemas_of_kubernetes(manifest: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = [*yaml.safe_load_all(manifest.read_text())]
    assert {each["kind"] for each in documents} == {
        "PersistentVolumeClaim",
        "Deployment",
        "Service",
    }
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_values_ask_for_the_plugin(path: Path) -> None:
    """As far as it can be seen without the chart."""
    (model,) = yaml.safe_load(path.read_text())["servingEngineSpec"]["modelSpec"]
    assert "--quantization=fusedq" in model["vllmConfig"]["extraArgs"]
    written = model["initContainer"]["extraVolumeMounts"]
    assert {**written[0], "readOnly": True} in model["extraVolumeMounts"]
    assert {"name": "PYTHONPATH", "value": written[0]["mountPath"]} in model["env"]
    assert f"FROM {model['repository']}:" in (DEPLOY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    """What vLLM's chart makes of the values: its documents, by the file's stem."""
    if CHART is None:
        pytest.skip("FUSEDQ_PRODUCTION_STACK_CHART names no copy of the chart's folder")
    charts = pytest.importorskip("helm_python.chart")
    with charts.Chart.load(CHART) as chart:
        found = {}
        for path in VALUES:
            values = yaml.safe_load(path.read_text())
            chart.validate_schema(values)
            texts = chart.render(values=values, name="fusedq").values()
            found[path.stem] = [d for text in texts for d in yaml.safe_load_all(text) if d]
    return found


def test_the_chart_installs_the_plugin_by_an_init_step(rendered) -> None:
    import kubernetes_validate

    for document in rendered["production-stack"]:
        kubernetes_validate.validate(document, "1.34", strict=False)
    engines = [each for each in rendered["production-stack"] if each["kind"] == "Deployment"]
    (engine,) = (each for each in engines if "deployment-vllm" in each["metadata"]["name"])
    pod = engine["spec"]["template"]["spec"]
    assert_the_plugin_is_found(pod)
    command = pod["containers"][0]["command"]
    assert command[:3] == ["vllm", "serve", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"]
    assert same_server(parsed(*command[2:]), parsed(*service("cuda")["command"]))


def test_the_chart_starts_ray_with_the_plugin_on_every_node(rendered) -> None:
    (cluster,) = (each for each in rendered["production-stack-ray"] if each["kind"] == "RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        assert_the_plugin_is_found(group["template"]["spec"])
    scripts = [each.get("data") or {} for each in rendered["production-stack-ray"]]
    (script,) = (each["vllm-entrypoint.sh"] for each in scripts if "vllm-entrypoint.sh" in each)
    # The chart's script collects its arguments and then replaces itself by them.
    lines = script.replace("exec ", "printf '%s\\n' ").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ARGS="))
    text = "\n".join(line for line in lines[start:] if "Executing" not in line)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    expected = parsed("--config", str(CONFIGS / "2-nodes-ray-8x-a100-llama-3.1-405b-gptq.yaml"))
    assert same_server(parsed(*done.stdout.split()[2:]), expected)


def assert_the_plugin_is_found(pod: dict[str, Any]) -> None:
    """The init step writes where the engine's Python looks."""
    (init,), (engine,) = pod["initContainers"], pod["containers"]
    (target,) = (each for each in init["volumeMounts"] if each["name"] == "fusedq")
    environment = {each["name"]: each.get("value") for each in engine["env"]}
    assert environment["PYTHONPATH"] == target["mountPath"]
    assert target["mountPath"] in [each["mountPath"] for each in engine["volumeMounts"]]
    assert "fusedq" in [each["name"] for each in pod["volumes"]]
    copied = f'CMD ["cp", "-r", "/plugin/.", "{target["mountPath"]}"]'
    assert copied in (DEPLOY / "Dockerfile").read_text()


def parsed(*arguments: str) -> dict[str, Any]:
    return vars(parse(*arguments))


def same_server(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """But for the address, the file they come from, and what vLLM does by default in any case."""
    apart = {"host", "port", "config", "model", "model_tag", "enable_prefix_caching"}
    models = [each["model_tag"] or each["model"] for each in (one, other)]
    differ = {key for key in one if key not in apart and one[key] != other[key]}
    return models[0] == models[1] and not differ


@pytest.mark.parametrize("name", SERVED)
def test_vllm_reads_the_commands_as_the_serving_configs(name: str) -> None:
    config = parsed("--config", str(CONFIGS / SERVED[name]))
    found = parsed(*service(name)["command"])
    assert (found["host"], found["port"]) == ("0.0.0.0", 8000)
    assert same_server(found, config)
