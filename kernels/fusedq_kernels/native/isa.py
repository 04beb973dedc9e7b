"""Instruction sets for which cpu-fused is compiled, and which of them this machine has."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

FORCED = "FUSEDQ_CPU_ISA"


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: what Linux must say of the CPU, and what tells a compiler to use it."""

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]

    @property
    def operator(self) -> str:
        """Its operator in `torch.ops.fusedq_cpu`."""
        return self.name.replace("-", "_")


def _isa(name: str, cpu_flags: str) -> Isa:
    flags = cpu_flags.split()
    return Isa(name, frozenset(flags), tuple(f"-m{flag.replace('512_', '512')}" for flag in flags))


_AVX512 = "avx512f avx512bw avx512vl avx512dq avx2 fma f16c"
ISAS = {
    isa.name: isa
    for isa in (
        # Zen 4 and Sapphire Rapids on
        _isa("avx512-bf16", f"{_AVX512} avx512vbmi avx512_bf16"),
        _isa("avx512", _AVX512),
        _isa("avx2", "avx2 fma f16c"),
        # What the compiler makes of plain vectors: x86-64 of any age, aarch64
        _isa("generic", ""),
    )
}
"""The best first."""


def of_this_architecture() -> tuple[Isa, ...]:
    """Those that its compiler knows; all but the last are of x86-64."""
    every = tuple(ISAS.values())
    return every if platform.machine() == "x86_64" else every[-1:]


@functools.cache
def this_isa() -> Isa:
    """The best that this machine has, or the one that the environment asks for (FUSEDQ_CPU_ISA).

    Raises:
        ValueError: the environment names none, or one that this machine does not have.
    """
    found = _cpu_flags()
    here = [isa for isa in ISAS.values() if isa.cpu_flags <= found]
    forced = os.environ.get(FORCED)
    if forced is None:
        return here[0]
    for isa in here:
        if isa.name == forced:
            return isa
    names = ", ".join(isa.name for isa in here)
    raise ValueError(f"{FORCED} is {forced!r}; this machine has {names}")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
