"""What the compiler makes of the gather, for any NVIDIA GPU, without one.

    python -m fusedq_kernels.audit.gather --target sm_90

One program moves a K block of a few rows, so what matters is that nothing spills, that packed words
come by the widest loads there are, and how few instructions a value takes.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton

from fusedq_kernels.audit.compile import (
    AUDIT_K,
    audited_groups,
    compile_kernel,
    disassemble,
    opcode,
    pointer_types,
    target_of,
    usual_spec,
    variant,
)
from fusedq_kernels.audit.rows import WARP_SIZE, CompiledRow
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import gather, gemm
from fusedq_kernels.geometry import BLOCK_K
from fusedq_kernels.types import QuantSpec, WeightType

_GROUP_SIZES = (8, 32, 128, AUDIT_K)
_WIDE_LOAD = "LDG.E.128"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherRow(CompiledRow):
    """The counts are SASS instructions of one thread."""

    DERIVED = ("instructions_per_value", "problems")

    has_perm: bool
    instructions: int
    wide_loads: int

    @property
    def instructions_per_value(self) -> float:
        threads = gather.NUM_WARPS * WARP_SIZE
        return self.instructions * threads / (gather.BLOCK_M * BLOCK_K)

    def _problems(self) -> list[str]:
        return [] if self.wide_loads else ["narrow loads of packed words"]


def audit_gather(
    target: str,
    weight_types: Iterable[WeightType] = tuple(WeightType),
    act_dtypes: Iterable[torch.dtype] = gemm.ACT_DTYPES,
    group_sizes: Iterable[int] = _GROUP_SIZES,
    has_perm: bool = False,
) -> list[GatherRow]:
    """Compile each combination for `target`, a name known to `device_by_name`."""
    return [
        audit_lookup(target, usual_spec(weight_type, group_size, act_dtype), act_dtype, has_perm)
        for weight_type in weight_types
        for act_dtype in act_dtypes
        for group_size in group_sizes
    ]


def audit_lookup(target: str, spec: QuantSpec, act_dtype: torch.dtype, has_perm: bool) -> GatherRow:
    """Compile one scheme for `target`, a name known to `device_by_name`."""
    kernel = compile_gather(target, spec, act_dtype, has_perm)
    instructions, seen = disassemble(kernel)
    names = [opcode(text) for _, text in instructions]
    # What stands behind the last exit is padding
    names = names[: len(names) - names[::-1].index("EXIT")]
    return GatherRow(
        **variant(target, spec, act_dtype),
        **seen,
        has_perm=has_perm,
        instructions=len(names),
        wide_loads=sum(name.startswith(_WIDE_LOAD) for name in names),
        local=sum(name.startswith(("LDL", "STL")) for name in names),
    )


def compile_gather(
    target: str, spec: QuantSpec, act_dtype: torch.dtype, has_perm: bool
) -> triton.compiler.CompiledKernel:
    """Compile the kernel exactly as `gather.prepare` would specialise it."""
    constants = gather.gather_constants(spec, audited_groups(spec), has_perm)
    if not has_perm:
        constants["perm_ptr"] = None
    return compile_kernel(
        gather.gather_kernel,
        target_of(device_by_name(target)),
        constants,
        pointer_types(spec, act_dtype),
        num_warps=gather.NUM_WARPS,
    )


def main(argv: list[str] | None = None) -> int:
    """Print a JSON array of rows; 1 where any has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fusedq_kernels.audit.gather")
    add = parser.add_argument
    add("--target", default="sm_90", help="known device or architecture")
    add("--weight-type", nargs="+", type=WeightType, default=list(WeightType))
    add("--group-size", nargs="+", type=int, default=_GROUP_SIZES)
    add("--perm", action="store_true", help="with activation reordering")
    args = parser.parse_args(argv)
    rows = audit_gather(
        args.target, args.weight_type, group_sizes=args.group_size, has_perm=args.perm
    )
    print(json.dumps([row.as_json() for row in rows], indent=1))
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
