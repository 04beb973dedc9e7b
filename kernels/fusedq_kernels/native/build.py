"""cpu-fused's library: compiled once for an instruction set, found again by what it was made of.

    python -m fusedq_kernels.native.build          compile for this machine into the package
    python -m fusedq_kernels.native.build --all    for every CPU like it: images travel

A library is named after its sources and flags, those of $CXXFLAGS too. It is looked for in the
package, then in the cache of the user (`$XDG_CACHE_HOME` or `~/.cache`, folder `vllm-fusedq`), and
compiled into the latter where it is in neither, its units side by side on all cores, once. It uses
PyTorch's stable interface for C++, so that one library serves every PyTorch from 2.11 on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusedq_kernels.native.isa import Isa, of_this_architecture, this_isa
from fusedq_kernels.user_cache import user_cache

SOURCES = Path(__file__).parent
_IN_PACKAGE = SOURCES / "built"
_FLAGS = (
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
_PARTIAL = "partial-"
_ALONE = "fusedq-cpu-"
_COMPILERS = ("g++", "c++", "clang++")


class BuildError(RuntimeError):
    """The library is not there and cannot be made."""


def compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, or the first of the usual ones."""
    asked = os.environ.get("CXX")
    found = (shutil.which(name) for name in ((asked,) if asked else _COMPILERS))
    return next((each for each in found if each), None)


def available(isa: Isa) -> bool:
    """Whether the kernel can run: its library is there, or a compiler is."""
    return _found(isa) is not None or compiler() is not None


def library(isa: Isa, header: Path | None = None) -> Path:
    """The library for an instruction set, compiled where it is not there yet.

    Processes that want it at once wait for the one that compiles; the file appears whole.

    Args:
        header: included before every unit, a measurement's own.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    if (found := _found(isa, header)) is not None:
        return found
    folder = user_cache("cpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError:
        # A read-only home: this process has its own
        return compile_into(Path(tempfile.mkdtemp(prefix=_ALONE)), isa, header)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Who holds the lock is alone: these are of processes that were killed
        for left in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        return _found(isa, header) or compile_into(folder, isa, header)


def forget(loaded: Path) -> None:
    """Remove a library of a process that has no cache, which has loaded it and is its only user."""
    if loaded.parent.name.startswith(_ALONE):
        shutil.rmtree(loaded.parent, ignore_errors=True)


def compile_into(folder: Path, isa: Isa, header: Path | None = None) -> Path:
    """Compile the library for an instruction set; raises BuildError."""
    program = compiler()
    if program is None:
        names = ", ".join(_COMPILERS)
        raise BuildError(
            f"kernel cpu-fused is not compiled for {isa.name} and there is no C++ compiler "
            f"({names}, or what CXX names); install one, or choose kernel cpu-striped"
        )
    target = folder / _name(isa, header)
    torch = _torch_folder() / "lib"
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PARTIAL) as partial:
        made, cores = Path(partial) / target.name, _cores()
        with ThreadPoolExecutor(len(cores), initializer=_use, initargs=(cores,)) as threads:
            commands = [unit_command(program, source, isa, header) for source in sources()]
            objects = list(threads.map(lambda each: _compiled(each, partial, isa), commands))
        link = ["-shared", *objects, "-o", str(made), f"-L{torch}", "-ltorch_cpu", "-lc10"]
        _run([program, *_flags(isa), *link], isa, partial)
        made.chmod(0o755)
        made.replace(target)
    return target


def unit_command(program: str, source: Path, isa: Isa, header: Path | None = None) -> list[str]:
    """What compiles one source for an instruction set; where to is left to say."""
    before = ("-include", str(header)) if header else ()
    name = f'-DFUSEDQ_ISA="{isa.operator}"'
    folders = (f"-I{_torch_folder() / 'include'}", f"-I{SOURCES}")
    return [program, *_flags(isa), name, *folders, *before, "-c", str(source)]


def _compiled(command: Sequence[str], folder: str, isa: Isa) -> str:
    made = f"{folder}/{Path(command[-1]).stem}.o"
    _run([*command, "-o", made], isa, folder)
    return made


def _run(command: Sequence[str], isa: Isa, folder: str) -> None:
    # The compiler's own files too: it cannot remove them where it is killed
    env = {**os.environ, "TMPDIR": folder}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise BuildError(
            f"{command[0]} could not compile kernel cpu-fused for {isa.name} "
            f"(exit code {done.returncode}); GCC 12 and newer can:\n{last}"
        )


def _cores() -> set[int]:
    """Those that any thread of this process may use: an engine binds each of its own to one."""
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        return set().union(*map(os.sched_getaffinity, threads))
    except OSError:
        return os.sched_getaffinity(0)


def _use(cores: set[int]) -> None:
    """Let this thread, and so the processes that it starts, run on any of `cores`."""
    os.sched_setaffinity(0, cores)


def sources() -> list[Path]:
    """The units, each compiled by itself."""
    return sorted(SOURCES.glob("*.cpp"))


def _found(isa: Isa, header: Path | None = None) -> Path | None:
    places = (folder / _name(isa, header) for folder in (_IN_PACKAGE, user_cache("cpu")))
    return next((path for path in places if path.is_file()), None)


def _name(isa: Isa, header: Path | None) -> str:
    return f"{isa.name}-{platform.machine()}-{_key(isa, header)}.so"


def _flags(isa: Isa) -> tuple[str, ...]:
    return (*_FLAGS, *isa.compiler_flags, *os.environ.get("CXXFLAGS", "").split())


@functools.cache
def _key(isa: Isa, header: Path | None) -> str:
    digest = hashlib.sha256(" ".join(_flags(isa)).encode())
    for file in (*sorted(SOURCES.glob("*.h")), *sources(), *([header] if header else [])):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def main(arguments: Sequence[str] = ()) -> None:
    _IN_PACKAGE.mkdir(exist_ok=True)
    for isa in of_this_architecture() if "--all" in arguments else (this_isa(),):
        path = _found(isa) or compile_into(_IN_PACKAGE, isa)
        print(f"kernel cpu-fused for {isa.name}: {path.name}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BuildError as error:
        sys.exit(str(error))
