"""What the compiler makes of the gather, for any NVIDIA GPU, without one.

    python -m fusedq_kernels.audit_gather --target sm_90

One program moves a K block of a few rows, so what matters is that nothing spills, that packed words
come by the widest loads there are, and how few instructions a value takes.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import triton
from triton.compiler import ASTSource

from fusedq_kernels import gather_kernel, geometry
from fusedq_kernels.ahead_of_time import disassemble, opcode, target_of
from fusedq_kernels.decode import DECODERS
from fusedq_kernels.device import device_by_name
from fusedq_kernels.gemm import ALIGNMENT, FP_FUSION, INTERPRETED
from fusedq_kernels.types import QuantSpec, WeightType

AUDIT_K = 1 << 16
_TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTERS = ("ids_ptr", "qweight_ptr", "scales_ptr", "perm_ptr", "y_ptr")
_ALIGNED = [["tt.divisibility", ALIGNMENT]]
_WIDE_LOAD = "LDG.E.128"
_MAX_REGISTERS = 255


@dataclass(frozen=True, slots=True)
class GatherRow:
    """`stack` and `smem` are bytes; the counts are SASS instructions of one thread."""

    target: str
    weight_type: str
    act_dtype: str
    group_size: int
    has_perm: bool
    registers: int
    stack: int
    smem: int
    instructions: int
    wide_loads: int
    local: int

    @property
    def instructions_per_value(self) -> float:
        return self.instructions * 32 / (gather_kernel.BLOCK_M * geometry.BLOCK_K)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that keeps this variant from being shipped."""
        found = []
        if self.local or self.stack or self.registers > _MAX_REGISTERS:
            found.append("spills")
        if self.smem > device_by_name(self.target).smem_per_block:
            found.append("shared memory")
        if not self.wide_loads:
            found.append("narrow loads of packed words")
        return tuple(found)


def audit_gather(
    target: str,
    weight_types: Iterable[WeightType] = tuple(DECODERS),
    act_dtypes: Iterable[torch.dtype] = tuple(_TRITON_NAMES),
    group_sizes: Iterable[int] = (8, 32, 128, AUDIT_K),
    has_perm: bool = False,
) -> list[GatherRow]:
    """Compile each combination for `target`, a name known to `device_by_name`."""
    return [
        _audit_one(target, QuantSpec(weight_type, group_size, act_dtype), act_dtype, has_perm)
        for weight_type in weight_types
        for act_dtype in act_dtypes
        for group_size in group_sizes
    ]


def _audit_one(target: str, spec: QuantSpec, act_dtype: torch.dtype, has_perm: bool) -> GatherRow:
    kernel = compile_gather(target, spec, act_dtype, has_perm)
    instructions, usage = disassemble(kernel.asm["cubin"])
    names = [opcode(text) for _, text in instructions]
    # What stands behind the last exit is padding
    names = names[: len(names) - names[::-1].index("EXIT")]
    return GatherRow(
        target=target,
        weight_type=spec.weight_type.value,
        act_dtype=_TRITON_NAMES[act_dtype],
        group_size=spec.group_size,
        has_perm=has_perm,
        registers=usage["REG"],
        stack=usage["STACK"],
        smem=kernel.metadata.shared,
        instructions=len(names),
        wide_loads=sum(name.startswith(_WIDE_LOAD) for name in names),
        local=sum(name.startswith(("LDL", "STL")) for name in names),
    )


def compile_gather(
    target: str, spec: QuantSpec, act_dtype: torch.dtype, has_perm: bool
) -> triton.compiler.CompiledKernel:
    """Compile the kernel exactly as `gather_rows` would specialise it."""
    if INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter has no compiler")
    kernel = gather_kernel.gather_kernel
    groups = geometry.group_geometry(AUDIT_K, spec.group_size, 0)
    constants = gather_kernel.gather_constants(spec, groups.step, groups.num_groups, has_perm)
    if not has_perm:
        # The JIT takes an argument that is None for a constant.
        constants["perm_ptr"] = None
    scales = "*i32" if spec.has_zero_points else "*fp32"
    act = "*" + _TRITON_NAMES[act_dtype]
    pointers = dict(zip(_POINTERS, ("*i64", "*i32", scales, "*i32", act), strict=True))
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {*pointers, "K", "n_padded"} - {*constants, "ids_ptr"}
    attrs = {(i,): _ALIGNED for i, name in enumerate(kernel.arg_names) if name in aligned}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=target_of(device_by_name(target)),
        options={"num_warps": gather_kernel.NUM_WARPS, "enable_fp_fusion": FP_FUSION},
    )


def as_json(row: GatherRow) -> dict[str, object]:
    """Its fields, and what follows from them."""
    derived = {"instructions_per_value": row.instructions_per_value, "problems": row.problems}
    return asdict(row) | derived


def main(argv: list[str] | None = None) -> int:
    """Print a JSON array of rows; 1 where any has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fusedq_kernels.audit_gather")
    add = parser.add_argument
    add("--target", default="sm_90", help="known device or architecture")
    add("--weight-type", nargs="+", type=WeightType, default=list(DECODERS))
    add("--group-size", nargs="+", type=int, default=[8, 32, 128, AUDIT_K])
    add("--perm", action="store_true", help="with activation reordering")
    args = parser.parse_args(argv)
    rows = audit_gather(
        args.target, args.weight_type, group_sizes=args.group_size, has_perm=args.perm
    )
    print(json.dumps([as_json(row) for row in rows], indent=1))
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
