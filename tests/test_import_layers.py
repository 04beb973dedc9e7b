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
    "measure",
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
# Rooms of the kernel library by floor: each imports those of lower floors, and itself.
FLOORS = [
    {"audit"},
    {"guard_experts"},
    {"guard", "testing"},
    {"warmup"},
    {"ops", "experts"},
    {"prepared"},
    {"catalogue"},
    {"record", "cpu", "cuda"},
    {"choose", "layouts", "reference"},
    {"call", "native"},
    {"types"},
    {"encodings", "geometry", "activation"},
    {"dtype", "lazy", "user_cache"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
KERNELS = ROOT / "kernels" / "fusedq_kernels"
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
        room = relative.with_suffix("").parts[2]
        assert "triton" not in roots or room in ("cuda", "audit")
        assert "torch" not in roots or room != "choose"
        for module in modules:
            other = module.split(".")[1:2]
            if module.startswith("fusedq_kernels.") and room != "__init__" and [room] != other:
                assert FLOOR_OF[other[0]] > FLOOR_OF[room], f"{relative} imports {module}"
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


def test_every_room_of_the_kernel_library_has_a_floor() -> None:
    rooms = {path.stem for path in KERNELS.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {room for room in rooms if not room.startswith("__")} == set(FLOOR_OF)


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


def test_choosing_imports_neither_torch_nor_triton() -> None:
    modules = [f"fusedq_kernels.choose.{path.stem}" for path in (KERNELS / "choose").glob("*.py")]
    names = ", ".join(sorted({*modules, "fusedq_kernels.catalogue", "fusedq_kernels.call"}))
    code = f"import sys, {names}; print({{'vllm', 'torch', 'triton'}} & set(sys.modules))"
    assert in_clean_process(code) == "set()\n"


def test_only_the_kernels_of_a_gpu_import_triton() -> None:
    code = (
        "import sys, fusedq_kernels.warmup, fusedq_kernels.layouts.packing\n"
        "import fusedq_kernels.cpu.wna16, fusedq_kernels.cpu.striped, fusedq_kernels.cpu.gather\n"
        "print({'vllm', 'triton'} & set(sys.modules))"
    )
    assert in_clean_process(code) == "set()\n"


def test_loading_imports_neither_vllm_nor_triton() -> None:
    code = "import sys, vllm_fusedq.load.loader; print({'vllm', 'triton'} & set(sys.modules))"
    assert in_clean_process(code) == "set()\n"


def test_the_kernels_folder_is_not_importable() -> None:
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    assert in_clean_process(code) == "None\n"
    assert not (ROOT / "kernels" / "__init__.py").exists()
