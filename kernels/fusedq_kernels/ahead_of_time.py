"""Compiles a Triton kernel for a GPU that is not here, and reads what came of it.

`audit.py` and `audit_slices.py` say which kernels, and what they may look like.
"""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedq_kernels import gemm
from fusedq_kernels.device import KNOWN_DEVICES
from fusedq_kernels.types import DeviceSpec

TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
WARP_SIZE = 32

_ALIGNED = [["tt.divisibility", gemm.ALIGNMENT]]
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH_TARGET = re.compile(r"0x([0-9a-f]+)")
_MMA_SASS = ("HGMMA", "HMMA", "UTCHMMA")


def architectures() -> list[str]:
    """Every architecture of a known device, by the name that `device_by_name` takes."""
    capabilities = dict.fromkeys(device.capability for device in KNOWN_DEVICES.values())
    return [f"sm_{major}{minor}" for major, minor in capabilities]


def target_of(device: DeviceSpec) -> GPUTarget:
    """The compiler's name for an NVIDIA GPU."""
    major, minor = device.capability
    return GPUTarget("cuda", 10 * major + minor, WARP_SIZE)


def compile_kernel(
    kernel: triton.JITFunction,
    target: GPUTarget,
    constants: Mapping[str, object],
    pointers: Mapping[str, str],
    aligned: Collection[str],
    **options: object,
) -> triton.compiler.CompiledKernel:
    """Compile as a launch would specialise it; arguments without a type in `pointers` are int32.

    `aligned` names the arguments that are multiples of 16.
    """
    if gemm.INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter has no compiler")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    attrs = {(i,): _ALIGNED for i, name in enumerate(kernel.arg_names) if name in aligned}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attrs),
        target=target,
        options={"enable_fp_fusion": gemm.FP_FUSION, **options},
    )


def disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """SASS as (address, text) and the REG and STACK figures of `cuobjdump -res-usage`."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = {
        key: int(value)
        for key, value in re.findall(r"\b(REG|STACK):(\d+)", done.stdout + done.stderr)
    }
    matches = (_INSTRUCTION.match(line) for line in sass.splitlines())
    return [(int(m[1], 16), m[2]) for m in matches if m], usage


def opcode(text: str) -> str:
    """The instruction with its modifiers, without predicate and operands."""
    return _PREDICATE.sub("", text).split()[0]


def main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The smallest loop that holds all tensor-core instructions any loop holds.

    Smallest, because barrier spin loops placed out of line look like loops around everything.
    """
    best: tuple[int, int] | None = None
    body: list[str] = []
    for address, text in instructions:
        target = _BRANCH_TARGET.search(text)
        if "BRA" not in opcode(text) or not target or int(target[1], 16) >= address:
            continue
        start = int(target[1], 16)
        candidate = [t for a, t in instructions if start <= a <= address]
        num_mma = sum(opcode(t).startswith(_MMA_SASS) for t in candidate)
        if best is None or (num_mma, -len(candidate)) > best:
            best, body = (num_mma, -len(candidate)), candidate
    return body
