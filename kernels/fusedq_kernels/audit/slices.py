"""Ahead-of-time inspection of the sliced kernel's half that is ours: dequantizing a slice.

It runs from memory to memory, so what counts is that codes and values move 16 bytes at a time and
nothing spills. `command.py` prints these rows after its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton

from fusedq_kernels.audit.compile import (
    audited_groups,
    compile_kernel,
    disassemble,
    opcode,
    pointer_types,
    target_of,
    usual_spec,
    variant,
)
from fusedq_kernels.audit.rows import (
    RESOURCE_COLUMNS,
    SCHEME_COLUMNS,
    VERDICT_COLUMNS,
    WARP_SIZE,
    Columns,
    CompiledRow,
)
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import gemm, sliced
from fusedq_kernels.geometry import BLOCK_K
from fusedq_kernels.types import QuantSpec, WeightType

_WIDE = {"128", "256"}
# SASS instructions per weight of the whole kernel, with Triton 3.9: 5 to 12, the most with groups
# of 8 rows. Writing 16 bits per weight to L2 leaves time for about 10.
_MAX_INSTRUCTIONS = 13.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRow(CompiledRow):
    """SASS instructions of one thread: `wide_loads` and `wide_stores` are accesses to global memory
    of 16 bytes or more, `narrow_stores` the others that store.
    """

    instructions: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int

    @property
    def instructions_per_weight(self) -> float:
        threads = sliced.NUM_WARPS * WARP_SIZE
        return self.instructions * threads / (sliced.BLOCK_N * BLOCK_K)

    def _problems(self) -> list[str]:
        found = []
        if not self.wide_loads:
            found.append("narrow loads")
        if self.narrow_stores or not self.wide_stores:
            found.append("narrow stores")
        if self.instructions_per_weight > _MAX_INSTRUCTIONS:
            found.append("instructions")
        return found


def audit_slices(
    target: str,
    weight_types: Iterable[WeightType] = tuple(WeightType),
    act_dtypes: Iterable[torch.dtype] = gemm.ACT_DTYPES,
    group_sizes: Iterable[int] = (128,),
) -> list[SliceRow]:
    """Compile each combination for `target`, a name known to `device_by_name`."""
    return [
        audit_slice(target, usual_spec(weight_type, group_size, act_dtype), act_dtype)
        for group_size in group_sizes
        for weight_type in weight_types
        for act_dtype in act_dtypes
    ]


def compile_slice(
    target: str, spec: QuantSpec, act_dtype: torch.dtype
) -> triton.compiler.CompiledKernel:
    """Compile `dequantize_slice_kernel` exactly as `sliced.dequantize` would specialise it."""
    return compile_kernel(
        sliced.dequantize_slice_kernel,
        target_of(device_by_name(target)),
        sliced.slice_constants(spec, audited_groups(spec), act_dtype),
        pointer_types(spec, act_dtype),
        num_warps=sliced.NUM_WARPS,
    )


def audit_slice(target: str, spec: QuantSpec, act_dtype: torch.dtype) -> SliceRow:
    """Compile one scheme for `target`, a name known to `device_by_name`."""
    kernel = compile_slice(target, spec, act_dtype)
    instructions, seen = disassemble(kernel)
    codes = [opcode(text).split(".") for _, text in instructions]
    wide = [code[0] for code in codes if _WIDE & set(code[1:])]
    names = [code[0] for code in codes]
    return SliceRow(
        **variant(target, spec, act_dtype),
        **seen,
        instructions=len(instructions),
        wide_loads=wide.count("LDG"),
        wide_stores=wide.count("STG"),
        narrow_stores=names.count("STG") - wide.count("STG"),
        local=names.count("LDL") + names.count("STL"),
    )


COLUMNS: Columns = {
    "target": lambda row: row.target,
    **SCHEME_COLUMNS,
    **RESOURCE_COLUMNS,
    "instr/w": lambda row: f"{row.instructions_per_weight:.2f}",
    "wide LDG": lambda row: row.wide_loads,
    "wide STG": lambda row: row.wide_stores,
    "narrow STG": lambda row: row.narrow_stores,
    **VERDICT_COLUMNS,
}
