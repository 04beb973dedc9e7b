"""The library of cpu-fused: found, compiled once, whole or not at all."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from fusedq_kernels.cpu import fused
from fusedq_kernels.native import build, isa
from fusedq_kernels.native.isa import ISAS, this_isa

AARCH64_COMPILER = "aarch64-linux-gnu-g++"
SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one line, which compiles in no time, and a cache of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "op.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "_IN_PACKAGE", folder / "built")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build._key.cache_clear()
    yield folder
    build._key.cache_clear()


def test_a_library_is_compiled_once_and_again_for_other_sources(sources: Path) -> None:
    one = build.library(this_isa())
    assert one.parent == sources.parent / "cache" / "vllm-fusedq" / "cpu"
    stamp = one.stat().st_mtime_ns
    assert build.library(this_isa()) == one
    assert one.stat().st_mtime_ns == stamp
    (sources / "more.h").write_text("#pragma once\n")
    build._key.cache_clear()
    assert build.library(this_isa()) != one
    assert {path.suffix for path in one.parent.iterdir()} == {".so", ""}


def test_units_are_linked_into_one(sources: Path) -> None:
    (sources / "op.cpp").write_text("int half();\n" + SOURCE.replace("42", "2 * half()"))
    (sources / "half.cpp").write_text("int half() { return 21; }\n")
    build._key.cache_clear()
    assert ctypes.CDLL(str(build.library(this_isa()))).answer() == 42


def test_units_are_compiled_on_every_core_that_a_thread_may_use(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine has bound the thread that asks to a core of its own."""
    every = os.sched_getaffinity(0)
    seen = []

    def compiled(command: list[str], folder: str, isa: object) -> str:
        seen.append(os.sched_getaffinity(0))
        return made(command, folder, isa)

    made = build._compiled
    monkeypatch.setattr(build, "_compiled", compiled)
    with ThreadPoolExecutor(1) as other:
        other.submit(os.getpid).result()
        os.sched_setaffinity(0, {min(every)})
        try:
            build.library(this_isa())
            assert os.sched_getaffinity(0) == {min(every)}
        finally:
            os.sched_setaffinity(0, every)
    assert seen == [every]


def test_a_header_changes_a_library_beside_the_other(sources: Path) -> None:
    header = sources.parent / "other.h"
    header.write_text("#define answer other\n")
    found = build.library(this_isa(), header)
    assert ctypes.CDLL(str(found)).other() == 42
    assert found == build.library(this_isa(), header) != build.library(this_isa())


def test_that_of_the_package_comes_first(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "built").mkdir()
    made = build.compile_into(sources / "built", this_isa())
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build.available(this_isa())
    assert build.library(this_isa()) == made


@pytest.mark.parametrize(("machine", "names"), [("x86_64", {*ISAS}), ("aarch64", {"generic"})])
def test_an_image_gets_one_for_every_cpu(
    sources: Path, monkeypatch: pytest.MonkeyPatch, machine: str, names: set[str]
) -> None:
    monkeypatch.setattr(isa.platform, "machine", lambda: machine)
    build.main(["--all"])
    made = [path.name for path in (sources / "built").iterdir()]
    assert {name.partition(f"-{machine}-")[0] for name in made} == names
    assert len(made) == len(names)
    assert all(build.library(ISAS[name]).parent == sources / "built" for name in names)


def test_a_read_only_cache_is_done_without_and_nothing_stays(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one process compiled for itself goes once it is loaded, what others will find stays."""
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    shared = build.library(this_isa())
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    own = build.library(this_isa())
    assert own.is_file()
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    # The library of one line has no operators
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    monkeypatch.setattr(torch.ops, "fusedq_cpu", MagicMock())
    for path in (own, shared):
        monkeypatch.setattr(fused, "library", lambda _, path=path: path)
        fused._loaded.__wrapped__()
    assert not own.parent.exists()
    assert shared.is_file()


def test_without_a_compiler_it_says_what_to_install(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compiler() is None
    assert not build.available(this_isa())
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler .* choose kernel cpu-s"):
        build.library(this_isa())


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(sources: Path) -> None:
    (sources / "op.cpp").write_text("#error no luck today\n")
    build._key.cache_clear()
    with pytest.raises(build.BuildError, match=r"(?s)could not compile .* no luck today"):
        build.library(this_isa())
    assert not list((sources.parent / "cache").rglob("*.so"))


def test_what_a_killed_process_was_compiling_goes_with_the_next(sources: Path) -> None:
    """Its library and the files of its compiler, all of which lie in one folder."""
    slow = sources / "slow"
    slow.write_text('#!/bin/sh\necho left > "$TMPDIR/cc.s"\nkill -9 $PPID\n')
    slow.chmod(0o755)
    code = (
        "from fusedq_kernels.native import build, isa\n"
        f"build.SOURCES = build.Path({str(sources)!r})\n"
        "build._IN_PACKAGE = build.SOURCES / 'built'\n"
        "build.library(isa.this_isa())"
    )
    env = {**os.environ, "CXX": str(slow)}
    killed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cache = sources.parent / "cache"
    assert [path.read_text() for path in cache.rglob("cc.s")] == ["left\n"]
    made = build.library(this_isa())
    assert {path.name for path in made.parent.iterdir()} == {".lock", made.name}


def test_the_environment_chooses_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> str:
        this_isa.cache_clear()
        return this_isa().name

    monkeypatch.setattr(isa, "_cpu_flags", lambda: ISAS["avx2"].cpu_flags)
    assert chosen() == "avx2"
    monkeypatch.setenv(isa.FORCED, "generic")
    assert chosen() == "generic"
    monkeypatch.setenv(isa.FORCED, "avx512")
    with pytest.raises(ValueError, match="is 'avx512'; this machine has avx2, generic"):
        chosen()
    monkeypatch.undo()
    this_isa.cache_clear()


def test_a_cpu_without_x86_flags_takes_plain_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux describes one of aarch64."""
    cpuinfo = "processor\t: 0\nFeatures\t: fp asimd aes atomics fphp asimdhp sve i8mm bf16\n"
    monkeypatch.setattr(isa, "Path", lambda _: SimpleNamespace(read_text=lambda: cpuinfo))
    this_isa.cache_clear()
    assert this_isa().name == "generic"
    monkeypatch.undo()
    this_isa.cache_clear()


@pytest.mark.skipif(
    shutil.which(AARCH64_COMPILER) is None, reason=f"this machine has no {AARCH64_COMPILER}"
)
@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_the_sources_are_of_aarch64_too(source: Path) -> None:
    command = build.unit_command(AARCH64_COMPILER, source, ISAS["generic"])
    done = subprocess.run([*command, "-fsyntax-only"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_processes_that_want_it_at_once_share_one(tmp_path: Path) -> None:
    code = "from fusedq_kernels.native import build, isa; print(build.library(isa.this_isa()))"
    code = f"from fusedq_kernels.native import build; build._IN_PACKAGE = build.Path('.')\n{code}"
    (tmp_path / "op.cpp").write_text(SOURCE)
    code = code.replace("build._IN", f"build.SOURCES = build.Path({str(tmp_path)!r}); build._IN", 1)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


def test_a_damaged_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(fused, "library", lambda _: broken)
    with pytest.raises(build.BuildError, match=r"broken.so is damaged; remove it"):
        fused._loaded.__wrapped__()
