"""Imports go one way; importing the package is cheap; `kernels` never becomes importable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room may import itself and those below it.
ORDER = [
    "cli",
    "integration",
    "worker",
    "prove",
    "load",
    "report",
    "plan",
    "settings",
    "formats",
    "checkpoint",
    "names",
    "errors",
]
SOURCES = sorted((ROOT / "vllm_fusedq").rglob("*.py")) + sorted(
    (ROOT / "kernels" / "fusedq_kernels").rglob("*.py")
)


def imported_modules(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def level(dotted: str) -> int | None:
    parts = dotted.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in ORDER else None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(source: Path) -> None:
    relative = source.relative_to(ROOT)
    modules = imported_modules(source)
    roots = {module.partition(".")[0] for module in modules}
    if relative.parts[0] == "kernels":
        assert not roots & {"vllm", "vllm_fusedq", "transformers"}
        return
    if "integration" not in relative.parts:
        assert "vllm" not in roots
    own = level(".".join(relative.with_suffix("").parts))
    for module in modules:
        if module.startswith("vllm_fusedq.") and own is not None:
            other = level(module)
            assert other is not None, module
            assert other >= own, f"{relative} imports {module}"


def test_every_package_file_has_a_place_in_the_order() -> None:
    for source in (ROOT / "vllm_fusedq").iterdir():
        if source.suffix == ".py" or (source / "__init__.py").exists():
            assert source.stem in (*ORDER, "__init__")


def in_clean_process(code: str) -> str:
    # -P: not even the working directory may help.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_fusedq, fusedq_kernels\n"
        "print({'vllm', 'torch', 'triton'} & set(sys.modules))"
    )
    assert in_clean_process(code) == "set()\n"


def test_planning_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, vllm_fusedq.plan.advice, vllm_fusedq.report.document, vllm_fusedq.settings\n"
        "print({'vllm', 'torch', 'triton'} & set(sys.modules))"
    )
    assert in_clean_process(code) == "set()\n"


def test_loading_imports_neither_vllm_nor_triton() -> None:
    code = "import sys, vllm_fusedq.load.loader; print({'vllm', 'triton'} & set(sys.modules))"
    assert in_clean_process(code) == "set()\n"


def test_the_kernels_folder_is_not_importable() -> None:
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    assert in_clean_process(code) == "None\n"
    assert not (ROOT / "kernels" / "__init__.py").exists()
