"""Compiles a Triton kernel for a GPU that is not here, and reads what came of it.

`command.py`, `slices.py` and `gather.py` say which kernels, `rows.py` what they may
look like.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedq_kernels.audit.flow import loops
from fusedq_kernels.audit.hazards import count_registers, find_hazards
from fusedq_kernels.audit.rows import WARP_SIZE
from fusedq_kernels.audit.sass import parse
from fusedq_kernels.call import NARROW_SCALES, SCALES_OF
from fusedq_kernels.choose.device import KNOWN_DEVICES
from fusedq_kernels.cuda import gemm
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import GroupGeometry, group_geometry
from fusedq_kernels.layouts.resident import scale_words
from fusedq_kernels.types import DeviceSpec, QuantSpec, WeightType

# In-features of an audited weight: groups of this size or more are one group per channel.
AUDIT_K = 1 << 16
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_SCALE_NAMES = {
    **{DType.FLOAT16: "fp16", DType.BFLOAT16: "bf16", DType.FLOAT32: "fp32"},
    **{DType.FLOAT8_E4M3FN: "e4m3", DType.FLOAT8_E8M0FNU: "e8m0"},
}

_SCALE_WORDS = {DType.INT32: "i32", DType.FLOAT32: "fp32"}
_ALIGNED = [["tt.divisibility", gemm.ALIGNMENT]]
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# Of what our kernels are made of. ALU works at half the rate of FMA; what is in neither has another
# pipe: tensor cores, memory, branches, the uniform datapath.
_PIPES = {
    "alu": "LOP3 SHF PRMT IADD3 VIADD LEA ISETP PLOP3 SEL IMNMX VIMNMX FSETP FSEL FMNMX MOV SGXT",
    "fma": "FFMA FMUL FADD HFMA2 HMUL2 HADD2 IMAD",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
_MMA_SASS = ("HGMMA", "HMMA", "UTCHMMA")
_MMA_PTX = re.compile(r"\b(wgmma)\.mma_async|\b(mma)\.sync|\b(tcgen05)\.mma")


def architectures() -> list[str]:
    """Every architecture of a known device, by the name that `device_by_name` takes."""
    capabilities = dict.fromkeys(device.capability for device in KNOWN_DEVICES.values())
    return [f"sm_{major}{minor}" for major, minor in capabilities]


def target_of(device: DeviceSpec) -> GPUTarget:
    """The compiler's name for an NVIDIA GPU."""
    major, minor = device.capability
    return GPUTarget("cuda", 10 * major + minor, WARP_SIZE)


def audited_groups(spec: QuantSpec) -> GroupGeometry:
    """Where the groups of an audited weight fall."""
    return group_geometry(AUDIT_K, spec.group_size, 0)


def variant(target: str, spec: QuantSpec, act_dtype: torch.dtype) -> dict[str, object]:
    """What is compiled for whom, by field of `CompiledRow`."""
    return {"target": target, **scheme_cells(spec, act_dtype)}


def scheme_cells(spec: QuantSpec, act_dtype: torch.dtype) -> dict[str, object]:
    """A scheme, by field of `CompiledRow`."""
    return {
        "weight_type": spec.weight_type.value,
        "act_dtype": TRITON_NAMES[act_dtype],
        "scale_dtype": _SCALE_NAMES[spec.scale_dtype],
        "group_size": spec.group_size,
    }


def usual_spec(
    weight_type: WeightType, group_size: int, scale_dtype: DType | torch.dtype
) -> QuantSpec:
    """A scheme with these scales, or with the first that such weights come with."""
    known, found = SCALES_OF[weight_type], DType.of(scale_dtype)
    found = known[0] if known[0] in NARROW_SCALES and found not in known else found
    return QuantSpec(weight_type, group_size, found, found is DType.FLOAT8_E4M3FN)


def pointer_types(spec: QuantSpec, act_dtype: torch.dtype) -> dict[str, str]:
    """Triton's type of every pointer that a kernel of ours takes, by argument name."""
    act = "*" + TRITON_NAMES[act_dtype]
    return {
        **dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr", "out_ptr"), act),
        **dict.fromkeys(("qweight_ptr", "arrivals_ptr", "perm_ptr"), "*i32"),
        **dict.fromkeys(("slots_ptr", "experts_ptr"), "*i32"),
        "scales_ptr": "*" + _SCALE_WORDS[scale_words(spec, audited_groups(spec)).dtype],
        "partial_ptr": "*fp32",
        "ids_ptr": "*i64",
    }


def compile_kernel(
    kernel: triton.JITFunction,
    target: GPUTarget,
    constants: Mapping[str, object],
    pointers: Mapping[str, str],
    **options: object,
) -> triton.compiler.CompiledKernel:
    """Compile as a launch does whose arguments are multiples of 16 wherever the kernel asks.

    Arguments without a type in `pointers` are int32; an argument that is None is a constant.
    """
    if gemm.INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter has no compiler")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    attrs = {
        (each.num,): _ALIGNED
        for each in kernel.params
        if each.name not in constants
        and not (each.do_not_specialize or each.do_not_specialize_on_alignment)
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attrs),
        target=target,
        options={"enable_fp_fusion": gemm.FP_FUSION, **options},
    )


def disassemble(
    kernel: triton.compiler.CompiledKernel,
) -> tuple[list[tuple[int, str]], dict[str, object]]:
    """SASS as (address, text), and what is to be seen there, by field of `CompiledRow`."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-sass", "-res-usage")
        )
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    matches = (_INSTRUCTION.match(line) for line in sass.stdout.splitlines())
    instructions = [(int(m[1], 16), m[2]) for m in matches if m]
    mma = {name for match in _MMA_PTX.findall(kernel.asm["ptx"]) for name in match if name}
    seen = {
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]),
        "smem": kernel.metadata.shared,
        "mma": "+".join(sorted(mma)),
        "hazards": count_registers(find_hazards(instructions)),
    }
    return instructions, seen


def opcode(text: str) -> str:
    """The instruction with its modifiers, without predicate and operands."""
    return _PREDICATE.sub("", text).split()[0]


def count_by_pipe(texts: Iterable[str]) -> dict[str, int]:
    """How many of the instructions the ALU and FMA pipes run, by field of `AuditRow`."""
    pipes = Counter(_PIPE_OF.get(opcode(text).split(".")[0]) for text in texts)
    return {pipe: pipes[pipe] for pipe in _PIPES}


def main_loop(instructions: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The smallest loop that holds all tensor-core instructions any loop holds; maybe none.

    Smallest, because the parts of K that one program adds up are a loop around it.
    """
    bodies = [
        instructions[first : last + 1] for first, last in loops([parse(*e) for e in instructions])
    ]
    return max(bodies, key=lambda body: (_num_mma(body), -len(body)), default=[])


def _num_mma(body: list[tuple[int, str]]) -> int:
    return sum(opcode(text).startswith(_MMA_SASS) for _, text in body)
