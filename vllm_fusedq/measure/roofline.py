"""Static roofline of the fused kernel: what a problem moves and computes, and how long that takes.

Pure arithmetic on plain data, no GPU and no Triton, so that a prediction can be written down before
a measurement and printed beside it. It is a bound with fixed costs, not a simulation: registers and
caches other than L2 are left out.
"""

from dataclasses import dataclass

from fusedq_kernels.choose.boards import BOARDS
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import BLOCK_K, group_geometry, round_up
from fusedq_kernels.layouts.resident import resident_tensors, scale_words
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    DeviceSpec,
    GemmShape,
    QuantSpec,
    TileConfig,
    WeightType,
)

# Start of a kernel to its first store with nothing to do, and the pass of the last arriver.
FIXED_SECONDS = 1.5e-6
SPLIT_SECONDS = 1.3e-6
# From a load's issue to its data under load: with fewer bytes in flight HBM cannot be kept busy.
LOADED_LATENCY_SECONDS = 0.9e-6

_ISSUE_LANES = 128
_ISSUE_EFFICIENCY = 0.8
_L2_BYTES_PER_CLOCK_PER_SM = 27.0
_HBM_EFFICIENCY = 0.9
_TENSOR_EFFICIENCY = 0.8
_SMEM_RESERVED_PER_PROGRAM = 1024
_MAX_WARPS_PER_SM = 64
_ACT_BYTES = 2
_PARTIAL_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rates:
    """Sustained rates of a device: bytes/s of HBM and of L2, FLOP/s of 16-bit tensor cores, Hz."""

    hbm: float
    l2: float
    tensor: float
    clock: float


# Datasheets: dense bf16 FLOP/s with fp32 accumulation, boost clock in Hz.
_DATASHEETS = {
    "a100": (312e12, 1.41e9),
    "a10": (125e12, 1.695e9),
    "rtx3090": (71e12, 1.695e9),
    "l40s": (362e12, 2.52e9),
    "l4": (121e12, 2.04e9),
    "rtx4090": (165e12, 2.52e9),
    "h100": (989e12, 1.98e9),
    "h200": (989e12, 1.98e9),
    "b200": (2250e12, 1.965e9),
    "rtx5090": (209e12, 2.407e9),
}
# SASS instructions of one thread in one K block: a fixed part, these per decoded weight, and for
# the scales one FMA per accumulator and group, or one multiplication per pair of weights. Fitted to
# `python -m fusedq_kernels.audit --target sm_90` (Triton 3.9, bf16, groups of 128), within 12 %.
_LOOP_INSTRUCTIONS = 120
_DECODE_INSTRUCTIONS = {
    WeightType.UINT4: 2.10,
    WeightType.UINT4B8: 1.55,
    WeightType.UINT8: 3.50,
    WeightType.UINT8B128: 2.75,
    WeightType.NF4: 3.45,
    WeightType.FP4: 3.05,
    WeightType.FLOAT8_E4M3FN: 3.50,
    WeightType.FLOAT4_E2M1F: 2.40,
}


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes, work and seconds of one multiplication; a `_s` field is what that part needs alone.

    `weight_bytes` are packed codes, scales and zero points with their padding; `dram_bytes` adds x,
    y and split-K partials; `l2_bytes` is what the tiles read and write, re-reads included.
    `waves` is programs per SM, `imbalance` the work of the busiest SM over the mean.
    """

    weight_bytes: int
    dram_bytes: int
    l2_bytes: int
    flops: int
    instructions: float
    programs: int
    waves: float
    imbalance: float
    dram_s: float
    l2_s: float
    issue_s: float
    tensor_s: float
    fixed_s: float

    @property
    def limiter(self) -> str:
        """What takes longest: "dram", "l2", "issue" or "tensor"."""
        parts = {"dram": self.dram_s, "l2": self.l2_s, "issue": self.issue_s}
        parts["tensor"] = self.tensor_s
        return max(parts, key=lambda name: parts[name])

    @property
    def seconds(self) -> float:
        """The slowest part and the fixed costs."""
        return max(self.dram_s, self.l2_s, self.issue_s, self.tensor_s) + self.fixed_s


def rates_for(device: DeviceSpec) -> Rates | None:
    """Sustained rates of a known device, or None for a GPU without a datasheet here and a CPU.

    0.9 of the HBM and 0.8 of the tensor-core datasheet, what the best streaming and matrix kernels
    reach; the rate of L2 is an assumption (27 bytes per clock and SM).
    """
    if device.name not in _DATASHEETS:
        return None
    tensor, clock = _DATASHEETS[device.name]
    return Rates(
        hbm=_HBM_EFFICIENCY * 1e9 * BOARDS[device.name].bandwidth,
        l2=_L2_BYTES_PER_CLOCK_PER_SM * device.num_sms * clock,
        tensor=_TENSOR_EFFICIENCY * tensor,
        clock=clock,
    )


def likely_rates(device: DeviceSpec) -> Rates:
    """Those of the known device that is most like a GPU: enough to order tiles by."""

    def difference(name: str) -> tuple[int, int]:
        known = device_by_name(name)
        (major, minor), (other, other_minor) = device.capability, known.capability
        generation = abs(10 * (major - other) + minor - other_minor)
        return generation, abs(device.num_sms - known.num_sms)

    nearest = min(_DATASHEETS, key=difference)
    found = rates_for(device) or rates_for(device_by_name(nearest))
    assert found is not None, "every device of the table has rates"
    return found


def packed_bytes(n: int, k: int, spec: QuantSpec) -> int:
    """Resident bytes of a packed weight `[n, k]` in its tiled layout, padding included."""
    layout = TILED_LAYOUTS[spec.weight_type]
    shapes = resident_tensors(layout, n, k, spec, 0, DType.BFLOAT16)
    return sum(tensor.nbytes for tensor in shapes.values())


def instructions_per_weight(spec: QuantSpec, tile: TileConfig, k: int) -> float:
    """Thread instructions of the main loop per weight that a tile decodes."""
    threads = 32 * tile.num_warps
    weights = tile.block_n * BLOCK_K / threads
    groups = group_geometry(k, spec.group_size, 0)
    if groups.num_groups == 1:
        scaling = 0.0
    elif tile.scale_weights:
        scaling = weights / 2
    else:
        scaling = tile.block_m * tile.block_n / threads * BLOCK_K / groups.step
    decode = _DECODE_INSTRUCTIONS[spec.weight_type] * weights
    return (_LOOP_INSTRUCTIONS + scaling + decode) / weights


def roofline(
    shape: GemmShape, spec: QuantSpec, device: DeviceSpec, tile: TileConfig, rates: Rates
) -> Roofline:
    """The bound of `triton-gemm` for one problem, tile and device.

    Every tile of tokens reads the whole weight through L2, every tile of outputs reads its tokens;
    from DRAM each is read once. Half of a wave's imbalance is hidden for memory, none for compute.
    """
    m, n, k = shape.m, shape.n, shape.k
    m_tiles = -(-m // tile.block_m)
    n_tiles = -(-round_up(n, 128) // tile.block_n)
    k_blocks = -(-k // BLOCK_K)
    programs = m_tiles * n_tiles * tile.split_k
    imbalance = _imbalance(programs, k_blocks, tile.split_k, m_tiles * n_tiles, device.num_sms)

    weight = packed_bytes(n, k, spec)
    activations = _ACT_BYTES * m * (k + n)
    partials = 2 * _PARTIAL_BYTES * tile.split_k * m * n if tile.split_k > 1 else 0
    l2 = weight * m_tiles + _ACT_BYTES * m * (k * n_tiles + n) + partials
    decoded = n_tiles * tile.block_n * k_blocks * BLOCK_K * m_tiles
    per_weight = instructions_per_weight(spec, tile, k)
    flops = 2 * decoded * tile.block_m

    in_flight = _in_flight(k, spec, tile, device, programs)
    hbm = min(rates.hbm, in_flight / LOADED_LATENCY_SECONDS)
    issue_rate = _ISSUE_LANES * _ISSUE_EFFICIENCY * device.num_sms * rates.clock
    memory_tail = (1 + imbalance) / 2
    return Roofline(
        weight_bytes=weight,
        dram_bytes=weight + activations,
        l2_bytes=l2,
        flops=2 * m * n * k,
        instructions=decoded * per_weight,
        programs=programs,
        waves=programs / device.num_sms,
        imbalance=imbalance,
        dram_s=(weight + activations) / hbm * memory_tail,
        l2_s=l2 / rates.l2 * memory_tail,
        issue_s=decoded * per_weight / issue_rate * imbalance,
        tensor_s=flops / rates.tensor * imbalance,
        fixed_s=FIXED_SECONDS + (SPLIT_SECONDS if tile.split_k > 1 else 0.0),
    )


def _imbalance(programs: int, k_blocks: int, split_k: int, tiles: int, num_sms: int) -> float:
    """K blocks of the busiest SM over the mean of all SMs, at least 1."""
    busiest = -(-programs // num_sms) * -(-k_blocks // split_k)
    return max(1.0, busiest * num_sms / (tiles * k_blocks))


def _in_flight(
    k: int, spec: QuantSpec, tile: TileConfig, device: DeviceSpec, programs: int
) -> float:
    """Bytes of packed weight that all SMs together can have requested and not yet received."""
    weight_tile = tile.block_n * BLOCK_K * spec.weight_type.bits // 8
    groups = group_geometry(k, spec.group_size, 0)
    words = tile.block_n // scale_words(spec, groups).rows * (BLOCK_K // groups.step)
    stage = weight_tile + _ACT_BYTES * tile.block_m * BLOCK_K + 4 * words
    by_smem = device.smem_per_block // (tile.num_stages * stage + _SMEM_RESERVED_PER_PROGRAM)
    by_warps = _MAX_WARPS_PER_SM // tile.num_warps
    resident = max(1, min(by_smem, by_warps))
    per_sm = min(resident, programs / device.num_sms)
    return device.num_sms * per_sm * max(1, tile.num_stages - 1) * weight_tile
