"""Every variant of the main kernel that the experts of a layer can have launched on a kind of GPU.

As in `variants.py`: from the rules of `choose/experts.py`, with each number that matters in few of
them. The way up with silu, from tokens, and the way down are compiled with everything else there
is. What differs from them in the addresses of rows or behind the main loop alone is compiled in
fewer schemes: another number of choices, one token, tokens in an expert's own order, other
activations.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fusedq_kernels.activation import ACTIVATIONS, SILU, Activation
from fusedq_kernels.audit.compile import AUDIT_K, audited_groups
from fusedq_kernels.audit.fused import Variant
from fusedq_kernels.audit.variants import COUNTS, specs
from fusedq_kernels.audit.variants import standing_for as standing_for_plain
from fusedq_kernels.choose.experts import choices_by_block, in_order_tile
from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.routed import Routed
from fusedq_kernels.types import DeviceSpec, QuantSpec, TileConfig

UP = Routed(2, y_sorted=True, activation=SILU)
DOWN = Routed(1, x_sorted=True)
# The number of choices divides an index: by nothing, a shift, or a multiplication.
_CHOICES = (1, 2, 3)
_CLAMPED = Activation("silu", limit=7.0, alpha=1.702, beta=1.0)
_OTHERS = (
    *(Activation(name, 7.0 if name == "swiglustep" else None) for name in ACTIVATIONS),
    *(_CLAMPED, Activation("situ", limit=7.0)),
)
_FEW_GROUPS = (32, 128, AUDIT_K)


def kinds() -> tuple[Routed, ...]:
    """Every one but `UP` and `DOWN`."""
    found = [replace(UP, top_k=choices) for choices in _CHOICES]
    found += [replace(UP, activation=each) for each in _OTHERS]
    found += [replace(UP, x_sorted=True, top_k=1), replace(UP, top_k=1, alone=True)]
    found += [replace(DOWN, alone=True)]
    return tuple(each for each in dict.fromkeys(found) if each not in (UP, DOWN))


def launchable(device: DeviceSpec) -> tuple[Variant, ...]:
    """Every one for the GPUs of a device's compute capability; of equal binaries the first."""
    found: dict[object, Variant] = {}
    for each in _all(device):
        found.setdefault(each.key(), each)
    return tuple(found.values())


def _all(device: DeviceSpec) -> Iterator[Variant]:
    for spec in specs(device):
        for act_dtype in gemm.ACT_DTYPES:
            own_scales = spec.scale_dtype.torch == act_dtype or spec.weight_type.codebook
            few = kinds() if spec.group_size in _FEW_GROUPS and own_scales else ()
            for routed in (UP, DOWN, *few):
                for tile in tiles(device, spec, routed):
                    for has_bias in (True, False):
                        yield Variant(tile, spec, act_dtype, has_bias, routed)


def tiles(device: DeviceSpec, spec: QuantSpec, routed: Routed) -> Iterator[TileConfig]:
    """The tiles of one way through experts, with every number of splits and of segments."""
    step = audited_groups(spec).step
    for batch_invariant in (False, True):
        known = choices_by_block(device, spec.weight_type, step, batch_invariant)
        for choice in (each for choices in known.values() for each in choices):
            for count in COUNTS if choice.may_split else COUNTS[:1]:
                yield _told(choice.tile, routed, split_k=count)
    in_order = in_order_tile(device, spec.weight_type, step)
    for count in COUNTS:
        yield _told(in_order, routed, segments=count)


def _told(tile: TileConfig, routed: Routed, **parts: int) -> TileConfig:
    """Only rows that are neighbours come by the tensor memory accelerator."""
    return replace(tile, x_descriptor=tile.x_descriptor and routed.x_sorted, **parts)


def standing_for(
    tile: TileConfig,
    spec: QuantSpec,
    k: int,
    phase: int,
    act_dtype: torch.dtype,
    has_bias: bool,
    routed: Routed,
) -> Variant:
    """The variant that a launch on a rank's experts with `k` rows from `phase` on is audited as."""
    plain = standing_for_plain(tile, spec, k, phase, act_dtype, has_bias)
    return replace(plain, routed=_kind(routed))


def _kind(routed: Routed) -> Routed:
    """As `kinds` has it: of the numbers of an activation only which there are."""
    top_k = routed.top_k
    if routed.x_sorted or routed.alone:
        top_k = 1
    elif top_k > 1:
        top_k = 2 if top_k & (top_k - 1) == 0 else 3
    own, activation = routed.activation, None
    if own is not None:
        known = [each for each in _OTHERS if each.name == own.name]
        alike = [each for each in known if (each.limit is None) == (own.limit is None)]
        (activation, *_) = alike or known
        if activation != SILU:
            # What is behind the loop changes no address.
            return replace(UP, activation=activation)
    return replace(routed, top_k=top_k, activation=activation)
