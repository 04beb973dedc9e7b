"""What the files of `deploy/` start."""

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VALUES = sorted(DEPLOY.glob("production-stack*.yaml"))


def service(name: str) -> dict[str, Any]:
    """A service of compose.yaml."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][name]


def environment(name: str) -> dict[str, str]:
    """What a service of compose.yaml sets, whatever is set where it is started."""
    found = service(name)["environment"]
    return {key: value for key, value in found.items() if not value.startswith("$")}


def container(name: str) -> dict[str, Any]:
    """The container of a Kubernetes manifest."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
    (found,) = (each for each in documents if each["kind"] == "Deployment")
    return found["spec"]["template"]["spec"]["containers"][0]


def on_this_machine(command: list[str], *replaced: str) -> list[str]:
    """The options of a start command without its model, and without those `replaced` here."""
    options = command[1:]
    assert all(each.startswith("--") for each in options), options
    return [each for each in options if each.partition("=")[0] not in replaced]
