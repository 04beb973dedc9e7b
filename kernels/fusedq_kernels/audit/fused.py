"""The main kernel as a launch has it compiled, one variant at a time."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusedq_kernels.audit.compile import (
    TRITON_NAMES,
    audited_groups,
    compile_kernel,
    count_by_pipe,
    disassemble,
    main_loop,
    opcode,
    pointer_types,
    target_of,
    variant,
)
from fusedq_kernels.audit.hazards import count_running
from fusedq_kernels.audit.rows import AuditRow
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.routed import UNROUTED, Routed
from fusedq_kernels.types import QuantSpec, TileConfig


class Inputs(NamedTuple):
    """What the compiler is told about a variant: equal inputs, equal binaries."""

    constants: Mapping[str, object]
    pointers: Mapping[str, str]
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation; `spec.group_size` of at least `compile.AUDIT_K` means per channel."""

    tile: TileConfig
    spec: QuantSpec
    act_dtype: torch.dtype
    has_bias: bool = True
    routed: Routed = UNROUTED

    def inputs(self) -> Inputs:
        """As `gemm.prepare` would specialise it."""
        groups = audited_groups(self.spec)
        constants = gemm.kernel_constants(
            self.spec, groups, self.tile, self.act_dtype, self.has_bias, self.routed
        )
        pointers = pointer_types(self.spec, self.act_dtype)
        if self.tile.x_descriptor:
            block = f"{self.tile.block_m}, {groups.step}"
            pointers["x_ptr"] = f"tensordesc<{TRITON_NAMES[self.act_dtype]}[{block}]>"
        # What a launch passes as None is a constant.
        if self.tile.split_k == 1:
            constants |= dict.fromkeys(("partial_ptr", "arrivals_ptr"))
        if not self.has_bias:
            constants["bias_ptr"] = None
        if not self.routed.top_k:
            constants |= gemm.UNROUTED_ARGUMENTS
        elif self.routed.alone:
            constants["slots_ptr"] = None
        return Inputs(constants, pointers, gemm.launch_options(self.tile))

    def key(self) -> str:
        """Equal for variants that are one binary."""
        return repr([sorted(each.items()) for each in self.inputs()])


def compile_gemm(
    target: GPUTarget,
    tile: TileConfig,
    spec: QuantSpec,
    act_dtype: torch.dtype,
    has_bias: bool = True,
    routed: Routed = UNROUTED,
) -> triton.compiler.CompiledKernel:
    """Compile the main kernel exactly as `gemm.prepare` would specialise it."""
    constants, pointers, options = Variant(tile, spec, act_dtype, has_bias, routed).inputs()
    return compile_kernel(gemm.fused_gemm_kernel, target, constants, pointers, **options)


def audit_tile(
    target: str,
    tile: TileConfig,
    spec: QuantSpec,
    act_dtype: torch.dtype,
    has_bias: bool = True,
    routed: Routed = UNROUTED,
) -> AuditRow:
    """Compile one tile for `target`, a name known to `device_by_name`."""
    gpu = target_of(device_by_name(target))
    kernel = compile_gemm(gpu, tile, spec, act_dtype, has_bias, routed)
    instructions, seen = disassemble(kernel)
    body = main_loop(instructions)
    ops = Counter(opcode(text).split(".")[0] for _, text in body)
    return AuditRow(
        **variant(target, spec, act_dtype),
        **seen,
        tile=tile,
        has_bias=has_bias,
        routed=routed.top_k > 0,
        tmem=kernel.metadata.tmem_size,
        loop_instructions=len(body),
        **count_by_pipe(text for _, text in body),
        sts=ops["STS"] + ops["STSM"],
        ldg=ops["LDG"],
        local=ops["LDL"] + ops["STL"],
        running=count_running(instructions, body[0][0]) if body else 0,
    )
