"""The wheel and the sdist, and the wheel beside vLLM in a fresh environment."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fusedq_kernels.native import build
from fusedq_kernels.native.isa import this_isa
from tiny_models import asset
from vllm_fusedq import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fusedq_kernels": ROOT / "kernels/fusedq_kernels", "vllm_fusedq": ROOT / "vllm_fusedq"}
MADE_HERE = {"__pycache__", "built"}
INSTALLED = """
import json
from importlib.metadata import distribution, entry_points
from pathlib import Path

import fusedq_kernels, vllm_fusedq
from fusedq_kernels.native import build
from fusedq_kernels.native.isa import this_isa

named = ("vllm.general_plugins", "vllm.endpoint_plugins", "console_scripts")
found = {group: entry_points(group=group, name="fusedq") for group in named}
print(json.dumps({
    "folders": [str(Path(each.__file__).parent) for each in (fusedq_kernels, vllm_fusedq)],
    "version": distribution("vllm-fusedq").version,
    "entry_points": {
        group: [each.value for each in points if each.load()] for group, points in found.items()
    },
    "library": build._name(this_isa(), None),
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of a new environment, in which pip finds vLLM installed and nothing of ours."""
    folder = tmp_path_factory.mktemp("fresh")
    make = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(make, check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # As a line of a .pth file it is a folder to look in: its own .pth files, those of the editable
    # installation among them, are not read.
    (site / "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    # Without them, pip would take the editable installation for this one.
    install = [*pip, "install", "--quiet", "--no-index", "--ignore-installed", "--no-deps"]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def files() -> Iterator[str]:
    """Every file of the two packages, as a wheel names it."""
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            if path.is_file() and not MADE_HERE & {*relative.parts}:
                yield f"{name}/{relative.as_posix()}"


def test_every_file_of_the_packages_is_in_the_wheel_and_the_sdist(built: Path, wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == set(files())
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2].removeprefix("kernels/") for name in archive.getnames()}
    assert held <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "docs/errors.md"} <= names


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_metadata(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_all("Project-URL")
    assert metadata.get_payload().startswith("# vllm-fusedq\n")


def test_what_the_wheel_needs_comes_with_vllm(metadata: Message) -> None:
    """But for vLLM itself, whose CUDA and CPU builds are two distributions."""
    every = [Requirement(each) for each in metadata.get_all("Requires-Dist")]
    needed = [each for each in every if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert not [each for each in needed if each.name.startswith("vllm")]
    assert [each for each in needed if not each.specifier.contains(version(each.name))] == []


def test_the_changelog_tells_of_this_version() -> None:
    headings = [
        line.split()[1]
        for line in (ROOT / "CHANGELOG.md").read_text().splitlines()
        if line.startswith("## ")
    ]
    assert headings[:2] == ["Unreleased", __version__]


def test_the_wheel_works_beside_vllm(fresh: Path) -> None:
    done = subprocess.run([fresh, "-c", INSTALLED], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    home = fresh.parents[1]
    assert all(home in Path(folder).parents for folder in found["folders"])
    assert found["version"] == __version__
    assert found["entry_points"] == {
        "vllm.general_plugins": ["vllm_fusedq:register"],
        "vllm.endpoint_plugins": ["vllm_fusedq.integration.endpoint:FusedQEndpoint"],
        "console_scripts": ["vllm_fusedq.cli:app"],
    }
    # Named after every source and flag
    assert found["library"] == build._name(this_isa(), None)


def test_the_command_of_the_wheel(fresh: Path) -> None:
    command = fresh.with_name("fusedq")
    model = str(asset("tiny-llama-awq-g128"))
    done = subprocess.run([command, "check", model, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fusedq_version"] == __version__
    assert answer["results"][0]["counts"]["fused"] == 8
