"""Which kernel and tile a problem gets, and which problems get none: pure functions of plain data.

`device.py` supplies the `DeviceSpec`; `gemm.py` and `cpu.py` run the `Launch`. Nothing here asks a
driver, so the answer given while planning is the answer at run time. `tiles.py` has the tiles of
the rules, `tuning.py` the measured rows, which come before them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from fusedq_kernels import tuning
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, group_geometry, round_up, whole_splits
from fusedq_kernels.tiles import rules_for
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    KernelName,
    Launch,
    QuantSpec,
    Reason,
    TileConfig,
    WeightType,
    layout_for,
    runs,
)

ACT_DTYPES = (torch.float16, torch.bfloat16)

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)
_MIN_STEP = 32

# Split-K: fill about two 128-wide tiles per SM, with at least four K blocks per split.
_TILES_PER_SM = 2.1
_MIN_BLOCKS_PER_SPLIT = 4
_MAX_SPLIT_K = 16

# A tile of this width is used from this N up, unless it is the last of its rule.
_MIN_N = {256: 4096, 128: 2049}


def kernels_for(device: DeviceSpec) -> tuple[KernelName, ...]:
    """Every implementation that `kernel_for` names for this device, the preferred one first."""
    if device.kind == "cuda":
        return (KernelName.TRITON_GEMM,)
    fused = (KernelName.CPU_WNA16,) if device.cpu_isa else ()
    return (*fused, KernelName.CPU_STRIPED)


def kernel_for(device: DeviceSpec, weight_type: WeightType) -> KernelName:
    """The one implementation that runs weights of this type on this device."""
    return next(kernel for kernel in kernels_for(device) if runs(kernel, weight_type))


def select(
    shape: GemmShape,
    spec: QuantSpec,
    device: DeviceSpec,
    table_for: Callable[[DeviceSpec], tuning.TunedTable | None] = tuning.table_for,
) -> Launch:
    """The kernel and tile for one problem that `unsupported_reasons` has passed.

    `table_for` supplies the measured rows, which come before the rules. Up to 64 tokens `split_k`
    depends on N and K alone, so a row's sum is cut at the same places whatever batch it arrives in.
    """
    kernel = kernel_for(device, spec.weight_type)
    if kernel is not KernelName.TRITON_GEMM:
        isa = f", {device.cpu_isa}" if device.cpu_isa else ""
        return Launch(kernel, None, f"rule: {device.kind}{isa}")
    table = table_for(device)
    found = None if table is None else tuning.find(table, shape, spec, kernels_for(device))
    if found is not None:
        return found
    rules = rules_for(device, layout_for(kernel, spec.weight_type))
    rule = next(rule for rule in rules if rule.max_m is None or shape.m <= rule.max_m)
    step = group_geometry(shape.k, spec.group_size, 0).step
    fitting = (c for c in rule.choices if step >= c.min_step and _fits(c.tile, shape.n))
    tile = next(fitting, rule.choices[-1]).tile
    tile = replace(tile, split_k=_split_k(shape, tile, device))
    tokens = f"m>{rules[-2].max_m}" if rule.max_m is None else f"m<={rule.max_m}"
    split = f", split {tile.split_k}" if tile.split_k > 1 else ""
    return Launch(kernel, tile, f"rule: {tokens}, {tile.block_m}x{tile.block_n}{split}")


def tiles_for(device: DeviceSpec, weight_type: WeightType, step: int) -> tuple[TileConfig, ...]:
    """Every tile that `select` can return for a GPU and a `GroupGeometry.step`, at `split_k` 1."""
    rules = rules_for(device, layout_for(KernelName.TRITON_GEMM, weight_type))
    choices = (choice for rule in rules for choice in rule.choices)
    return tuple(dict.fromkeys(choice.tile for choice in choices if step >= choice.min_step))


def unsupported_reasons(
    n: int, k: int, spec: QuantSpec, phase: int, device: DeviceSpec, act_dtype: torch.dtype
) -> tuple[Reason, ...]:
    """Every reason why this device cannot run this layer fused; empty if it can.

    Args:
        n, k: out_features and in_features that one rank holds.
        spec: the layer's scheme.
        phase: position of the rank's first input feature within its group.
        device: where it would run.
        act_dtype: dtype of the activations.

    Raises:
        ValueError: `k` or `phase` is no valid size (see `geometry.count_groups`).
    """
    kernel = kernel_for(device, spec.weight_type)
    reasons = []
    if n % 8:
        reasons.append(Reason(f"{n} out_features per rank", "multiples of 8"))
    if k % 16:
        reasons.append(Reason(f"{k} in_features per rank", "multiples of 16"))
    if act_dtype not in ACT_DTYPES:
        reasons.append(Reason(f"activations in {_name(act_dtype)}", _names(ACT_DTYPES)))
    if kernel is KernelName.TRITON_GEMM and device.capability < _MIN_CAPABILITY:
        found, needed = ("{}.{}".format(*c) for c in (device.capability, _MIN_CAPABILITY))
        reasons.append(
            Reason(f"{device.name} of compute capability {found}", f"{needed} and newer")
        )
    reasons += _scale_reasons(spec, kernel)
    reasons += _group_reasons(k, spec, phase, kernel)
    return tuple(reasons)


def _fits(tile: TileConfig, n: int) -> bool:
    divides = round_up(n, BLOCK_N) % tile.block_n == 0
    return divides and n >= _MIN_N.get(tile.block_n, 0)


def _split_k(shape: GemmShape, tile: TileConfig, device: DeviceSpec) -> int:
    tiles = round_up(shape.n, BLOCK_N) // BLOCK_N
    if shape.m > tuning.MAX_DECODE_M:
        tiles *= -(-shape.m // tile.block_m)
    num_blocks = -(-shape.k // BLOCK_K)
    split_k = 1
    while (
        2 * split_k * tiles <= _TILES_PER_SM * device.num_sms
        and num_blocks >= _MIN_BLOCKS_PER_SPLIT * split_k
        and split_k < _MAX_SPLIT_K
    ):
        split_k *= 2
    return whole_splits(num_blocks, split_k)


def _scale_reasons(spec: QuantSpec, kernel: KernelName) -> list[Reason]:
    supported = _SCALE_DTYPES
    if spec.has_zero_points and kernel is not KernelName.CPU_WNA16:
        # P4 keeps scale and zero point in one 32-bit word.
        supported = (torch.float16, torch.bfloat16)
    if spec.scale_dtype in supported:
        return []
    beside = " beside zero points" if spec.has_zero_points else ""
    return [Reason(f"scales in {_name(spec.scale_dtype)}{beside}", _names(supported))]


def _group_reasons(k: int, spec: QuantSpec, phase: int, kernel: KernelName) -> list[Reason]:
    geometry = group_geometry(k, spec.group_size, phase)
    if geometry.num_groups == 1 or kernel is KernelName.CPU_STRIPED:
        return []
    if kernel is KernelName.CPU_WNA16:
        if spec.group_size % 2:
            supported = "even group sizes, or one group for all in_features of the rank"
            return [Reason(f"group_size {spec.group_size}", supported)]
        return []
    reasons = []
    if spec.group_size % _MIN_STEP:
        supported = f"multiples of {_MIN_STEP}, or one group for all in_features of the rank"
        reasons.append(Reason(f"group_size {spec.group_size}", supported))
    if phase % 16:
        found = f"a rank that starts {phase} in_features into a group"
        reasons.append(Reason(found, "multiples of 16"))
    return reasons


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(_name(dtype) for dtype in dtypes)
