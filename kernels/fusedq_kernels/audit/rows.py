"""What the compiler made of one kernel variant, and what is wrong with it.

`command.py`, `slices.py` and `gather.py` compile and count. The budgets of the main kernel are a
few hundredths above what the tiles of `choose/tiles.py` take with Triton 3.6 to 3.9.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.geometry import BLOCK_K
from fusedq_kernels.types import TileConfig, WeightType

WARP_SIZE = 32
_MAX_REGISTERS = 255
_MAX_TMEM = 512
# Bytes per thread that the last sum of a split, or where the rows of experts lie, may keep in
# memory, beside the main loop.
_MAX_STACK_BESIDE = 16

_TENSOR_CORES = {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}

# SASS instructions per weight that one thread may spend in the main loop, with groups of whole 128
# rows and 4-bit integers; steps of 64 or fewer add a scale and an accumulation each. HBM of an H200
# allows about 4 for up to 16 tokens, and 8 where a weight has 8 bits. Where the scale multiplies
# the weights it may be in fp32: without the dtype of the activations that takes 3 more.
_INSTRUCTIONS = {
    **{"8x128": 2.7, "8x64": 2.9, "16x128": 2.75, "16x64": 3.6},
    **{"32x128": 3.2, "32x64": 4.0, "64x128": 4.3, "64x64": 4.8, "128x128": 4.9},
    **{"64x64s": 7.2, "128x64s": 7.2, "128x128s": 7.4, "256x128s": 7.8},
}
# The same with groups of 32, and what a zero point per group takes there.
_INSTRUCTIONS_GROUPS_OF_32 = {"8x128": 3.2, "16x128": 3.45}
_ZERO_POINTS_GROUPS_OF_32 = 0.3
# What these may take for themselves, by weight type, group size and tile.
_INSTRUCTIONS_OF = {
    **{("uint4b8", 32, "8x128"): 3.0, ("uint4b8", 32, "16x128"): 3.2},
    ("float4_e2m1f", 16, "16x128"): 4.5,
}
# What another weight type may spend beyond that: the codes of 8 bits take more loads, an entry of a
# codebook more permutes, the sign of a float a path of its own.
_BEYOND = {
    **{"uint4": 0, "uint4b8": 0, "uint8": 0.3, "uint8b128": 0.2, "nf4": 1.3, "fp4": 1.1},
    **{"float8_e4m3fn": 0.9, "float4_e2m1f": 1.2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRow(ABC):
    """What every audit looks at: `smem` and `stack` are bytes, `stack` above zero means spilled
    registers, and `local` is the SASS instructions of one thread that move those. `mma` names the
    instructions for tensor cores, `hazards` counts registers (`hazards.py`).
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("instructions_per_weight", "problems")

    target: str
    weight_type: str
    act_dtype: str
    scale_dtype: str
    group_size: int
    registers: int
    stack: int
    smem: int
    mma: str
    hazards: int
    local: int

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that keeps this variant from being shipped."""
        found = []
        if self.local or self.stack > self._max_stack() or self.registers > _MAX_REGISTERS:
            found.append("spills")
        if self.smem > device_by_name(self.target).smem_per_block:
            found.append("shared memory")
        if self.hazards:
            found.append(f"{self.hazards} registers touched under a running wgmma")
        return (*found, *self._problems())

    def _max_stack(self) -> int:
        return 0

    @abstractmethod
    def _problems(self) -> list[str]:
        """Those of this kernel alone."""

    def as_json(self) -> dict[str, object]:
        """Its fields, and what follows from them."""
        return asdict(self) | {name: getattr(self, name) for name in self.DERIVED}


Columns = dict[str, Callable[..., object]]

SCHEME_COLUMNS: Columns = {
    "weight": lambda row: row.weight_type,
    "act": lambda row: row.act_dtype,
    "scale": lambda row: row.scale_dtype,
    "group": lambda row: row.group_size,
}
RESOURCE_COLUMNS: Columns = {
    "regs": lambda row: row.registers,
    "stack": lambda row: row.stack,
    "smem": lambda row: row.smem,
    "mma": lambda row: row.mma,
}
VERDICT_COLUMNS: Columns = {
    "local": lambda row: row.local,
    "hazards": lambda row: row.hazards,
    "problems": lambda row: ", ".join(row.problems) or "none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow(CompiledRow):
    """`tmem` is columns of tensor memory (sm_100). The counts from `loop_instructions` on, and
    `local`, are SASS instructions of one thread in one K block of the main loop: `alu` and `fma`
    those of these two pipes, `sts` stores to shared memory, `ldg` loads from global memory that
    were not made asynchronous, `running` wgmmas that may still run when the next block begins.
    `routed` is for experts.
    """

    tile: TileConfig
    has_bias: bool
    routed: bool = False
    tmem: int
    loop_instructions: int
    alu: int
    fma: int
    sts: int
    ldg: int
    running: int

    @property
    def tile_name(self) -> str:
        return tile_name(self.tile)

    @property
    def instructions_per_weight(self) -> float:
        threads = self.tile.num_warps * WARP_SIZE
        return self.loop_instructions * threads / (self.tile.block_n * BLOCK_K)

    def _max_stack(self) -> int:
        return _MAX_STACK_BESIDE if self.tile.split_k > 1 or self.routed else 0

    def _problems(self) -> list[str]:
        found = []
        if self.tmem > _MAX_TMEM:
            found.append("tensor memory")
        if not self.loop_instructions:
            found.append("no main loop")
        if self.sts:
            found.append("stores to shared memory")
        if self.ldg:
            found.append("loads that are waited for")
        if self.running:
            found.append("wgmma running into the next block")
        # Triton 3.6 compiles 8 tokens to mma.sync everywhere.
        expected = {_TENSOR_CORES.get(device_by_name(self.target).capability[0], "mma")}
        expected |= {"mma"} if self.tile.block_m == 8 else set()
        if self.mma not in expected:
            found.append("tensor cores")
        if self.instructions_per_weight > self._budget():
            found.append("instructions")
        return found

    def _budget(self) -> float:
        """mma.sync and groups of other sizes repeat work that the budget does not count."""
        if device_by_name(self.target).capability[0] != 9 or self.tile.segments != 1:
            return float("inf")
        key = (self.weight_type, self.group_size, self.tile_name)
        if key in _INSTRUCTIONS_OF:
            return _INSTRUCTIONS_OF[key]
        budgets, more = {}, _BEYOND[self.weight_type]
        if self.group_size % BLOCK_K == 0:
            budgets = _INSTRUCTIONS
        elif self.group_size == 32:
            budgets = _INSTRUCTIONS_GROUPS_OF_32
            more += _ZERO_POINTS_GROUPS_OF_32 * WeightType(self.weight_type).has_zero_points
        return budgets.get(self.tile_name, float("inf")) + more


def tile_name(tile: TileConfig) -> str:
    """ "16x128"; "128x128s" where the scale multiplies the weights."""
    return f"{tile.block_m}x{tile.block_n}{'s' if tile.scale_weights else ''}"
