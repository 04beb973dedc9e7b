"""Boards: what vendors publish of the GPUs that planning knows by name.

A board's sheet gives the number of SMs (CUDA cores over those of an SM: 128, but 64 on sm_70, sm_75
and sm_80; what a sheet leaves out is as `deviceQuery` prints it) and the bandwidth; how much shared
memory a block may have comes from the table of compute capabilities in the CUDA programming guide.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedq_kernels.types import DeviceSpec

_KIB = 1024
_MIB = 1 << 20
_SMEM_PER_BLOCK = {
    (7, 0): 96 * _KIB,
    (7, 5): 64 * _KIB,
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 7): 163 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (10, 3): 227 * _KIB,
    (11, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
    (12, 1): 99 * _KIB,
}
# AMD's name for it is local data share (LDS).
_LDS = {"gfx942": 64 * _KIB, "gfx950": 160 * _KIB}
HIP_ARCHES = tuple(_LDS)
"""AMD's architectures for which kernels are compiled."""


@dataclass(frozen=True, slots=True)
class Board:
    """A GPU as it is sold.

    `memory` is MiB as `nvidia-smi` prints them; of a GPU that shares its memory with a CPU, which
    has none to print, the sheet's gigabytes. `bandwidth` is GB/s. `driver` is words of the driver's
    name for it, `name` where that is among them. Of an AMD GPU `arch` is the architecture, and SMs
    are compute units.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    memory: int
    bandwidth: float
    source: str
    driver: str = ""
    arch: str = ""

    @property
    def device(self) -> DeviceSpec:
        if self.arch:
            return hip_device(self.name, self.arch, self.num_sms)
        return DeviceSpec(
            self.name, "cuda", self.capability, self.num_sms, _SMEM_PER_BLOCK[self.capability]
        )

    @property
    def memory_bytes(self) -> int:
        return self.memory * _MIB


def hip_device(name: str, arch: str, num_sms: int = 0) -> DeviceSpec:
    """An AMD GPU; of an architecture that is not one of `HIP_ARCHES` too."""
    lds = _LDS.get(arch, 0)
    return DeviceSpec(name, "hip", num_sms=num_sms, smem_per_block=lds, arch=arch)


_SHARED_64_GB, _SHARED_128_GB = (gigabytes * 10**9 // _MIB for gigabytes in (64, 128))

# SXM variants where a name covers several boards; the first of a capability stands for "sm_XX".
BOARDS = {
    board.name: board
    for board in (
        Board("v100", (7, 0), 80, 32768, 900, "Tesla V100 datasheet, 32 GB SXM2"),
        Board("t4", (7, 5), 40, 15360, 320, "Tesla T4 product brief"),
        Board("a100", (8, 0), 108, 81920, 2039, "A100 datasheet, 80 GB SXM"),
        Board("a10", (8, 6), 72, 23028, 600, "A10 datasheet"),
        Board("a10g", (8, 6), 80, 23028, 600, "Amazon EC2 G5 instances"),
        Board("a40", (8, 6), 84, 46068, 696, "A40 datasheet"),
        Board("a6000", (8, 6), 84, 49140, 768, "RTX A6000 datasheet", "rtxa6000"),
        Board("rtx3090", (8, 6), 82, 24576, 936, "GA102 whitepaper"),
        Board("jetson-orin", (8, 7), 16, _SHARED_64_GB, 205, "Jetson AGX Orin 64 GB", "orin"),
        Board("l40s", (8, 9), 142, 46068, 864, "L40S datasheet"),
        Board("l4", (8, 9), 58, 23034, 300, "L4 datasheet"),
        Board("rtx4090", (8, 9), 128, 24564, 1008, "Ada whitepaper"),
        Board("rtx6000-ada", (8, 9), 142, 49140, 960, "RTX 6000 Ada datasheet", "rtx6000 ada"),
        Board("h100", (9, 0), 132, 81559, 3350, "H100 datasheet, SXM"),
        Board("h200", (9, 0), 132, 143771, 4800, "H200 datasheet"),
        Board("h20", (9, 0), 78, 97871, 4000, "HGX H20 datasheet, 96 GB"),
        Board("h800", (9, 0), 132, 81559, 3350, "H800 datasheet, SXM"),
        Board("gh200", (9, 0), 132, 97871, 4000, "GH200 datasheet, 96 GB"),
        Board("b200", (10, 0), 148, 183359, 8000, "DGX B200 datasheet"),
        Board("gb200", (10, 0), 152, 189471, 8000, "GB200 NVL72 datasheet"),
        Board("b300", (10, 3), 148, 275040, 8000, "DGX B300 datasheet"),
        Board("gb300", (10, 3), 152, 284208, 8000, "GB300 NVL72 datasheet"),
        Board("jetson-thor", (11, 0), 20, _SHARED_128_GB, 273, "Jetson T5000 datasheet", "thor"),
        Board("rtx5090", (12, 0), 170, 32607, 1792, "RTX Blackwell whitepaper"),
        Board("rtxpro6000", (12, 0), 188, 97887, 1597, "RTX PRO 6000 Server", "rtxpro 6000"),
        Board("dgx-spark", (12, 1), 48, _SHARED_128_GB, 273, "DGX Spark datasheet", "gb10"),
        Board("mi300x", (0, 0), 304, 196592, 5300, "Instinct MI300X data sheet", arch="gfx942"),
        Board("mi355x", (0, 0), 256, 288 * 10**9 // _MIB, 8000, "Instinct MI355X", arch="gfx950"),
    )
}
