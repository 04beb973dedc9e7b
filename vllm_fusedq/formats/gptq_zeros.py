"""Words of GPTQ checkpoints, and the zero points in them: as they are, or stored minus one.

Configs name the wrong one of the two (with either error), so the values are asked as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fusedq_kernels.lazy import torch
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import LayerFormat, Region
from vllm_fusedq.formats.shared.findings import Finding
from vllm_fusedq.formats.shared.unpacking import take, unpack_columns
from vllm_fusedq.formats.shared.widening import symmetric_zero

if TYPE_CHECKING:
    from vllm_fusedq.formats.gptq_packing import GptqPacking


class Conventions(NamedTuple):
    """What a tool calls the two: an entry of its config, and the value that it has for either."""

    setting: str
    minus_one: str
    as_they_are: str

    def offsets(self) -> dict[str, int]:
        """What has to be added to a stored zero point, by name."""
        return {self.minus_one: 1, self.as_they_are: 0}


GPTQ = Conventions("checkpoint_format", "gptq", "gptq_v2")
ZERO_OFFSETS = GPTQ.offsets()
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""One in every field of a word."""

# Codes whose mean tells the two formats apart: weights average to nearly nothing, so that codes
# average to their zero points, which one of the two readings misses by a whole code.
JUDGED_CODES = 1 << 16
JUDGED_BITS = 4
CLOSE = 0.25


def straddles(bits: int) -> bool:
    """Whether codes of `bits` bits straddle words."""
    return 32 % bits != 0


def unpack(words: torch.Tensor, bits: int, start: int, length: int) -> torch.Tensor:
    """Codes uint8 `[R, length]` of words int32 `[R, W]` that begin at or before index `start`."""
    straddling = straddles(bits)
    codes = unpack_columns(words, bits, straddling)
    return take(codes, 1, start, length, 32 if straddling else 32 // bits)


def _stored_zeros(qzeros: torch.Tensor, bits: int, region: Region) -> torch.Tensor:
    """uint8 `[n, G]`, as they are in the file."""
    return unpack(qzeros, bits, region.n_start, region.n).T


def zero_points(
    qzeros: torch.Tensor, packing: GptqPacking, layer: LayerFormat, region: Region
) -> torch.Tensor | None:
    """Zero points uint8 `[n, G]` of words int32 `[G, W]`, None where sym leaves only one.

    GPTQModel makes v1 by subtracting one from every field of a word at once, so that a zero point
    of 0 borrows from the next field; adding it back in the same way is exact. Fields that straddle
    words are taken one by one there, and by AutoRound.
    """
    stored = _stored_zeros(qzeros, packing.bits, region)
    low, high = (int(bound) for bound in stored.aminmax())
    zero, top = symmetric_zero(packing.bits), (1 << packing.bits) - 1
    if not layer.spec.has_zero_points:
        # sym leaves no other zero point, so a checkpoint that names the wrong one of the two
        # formats (they exist, with either error) is still read without doubt
        if low == high and low + 1 in (zero, zero + 1):
            return None
        found = f"{low}" if low == high else f"{low} to {high}"
        raise WeightLoadError(
            f"{layer.module}.qzeros: found stored zero points {found} although the config says "
            f"sym true, expected {zero - packing.zero_offset} everywhere (zero point "
            f"{zero}); set sym to false in the config if this model has zero points"
        )
    if packing.zero_offset == 0:
        return stored.contiguous()
    if high < top:
        return (stored + 1).contiguous()
    if straddles(packing.bits):
        return ((stored + 1) & top).contiguous()
    _check_underflow(qzeros, packing, layer.module)
    return _stored_zeros(qzeros + ONES[packing.bits], packing.bits, region).contiguous()


def _check_underflow(qzeros: torch.Tensor, packing: GptqPacking, module: str) -> None:
    """Refuse words whose two highest fields are full, which a borrow does not explain.

    AutoGPTQ fills all fields above a zero point of 0 that it stores minus one, and destroys them.
    Below 4 bits full fields are too common to tell.
    """
    bits = packing.bits
    if bits < 4:
        return
    full = (1 << bits) - 1
    setting, minus_one, as_they_are = packing.conventions
    if bool((qzeros >> (32 - 2 * bits) == -1).any()):
        raise WeightLoadError(
            f"{module}.qzeros: found stored zero points {full} side by side, which in "
            f"{setting} {minus_one} are {full + 1}, or 0 after an underflow that destroyed its "
            f"neighbours; supported are zero points that fit {bits} bits; set "
            f"{setting} to {as_they_are} in the config if they are stored as they are, or "
            "quantize again"
        )


def judge(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    groups: torch.Tensor,
    packing: GptqPacking,
    layer: LayerFormat,
    region: Region,
) -> Finding:
    """Which convention a region was stored in, by its own values.

    Args:
        qweight, qzeros: the words of the region, as stored.
        groups: int64 `[region.k]`, the column of qzeros that each in_feature uses.

    Raises:
        WeightLoadError: the values contradict what the config names.
    """
    setting, offsets = packing.conventions.setting, packing.conventions.offsets()
    said = next(name for name, offset in offsets.items() if offset == packing.zero_offset)
    stored = _stored_zeros(qzeros, packing.bits, region)
    if not layer.spec.has_zero_points:
        zero = int(stored[0, 0])
        found = _named(offsets, symmetric_zero(packing.bits) - zero, 0)
        return Finding(said, found, f"sym is true and every stored zero point {zero}", setting)
    rows = min(region.n, -(-JUDGED_CODES // region.k))
    if packing.bits > JUDGED_BITS or rows * region.k < JUDGED_CODES:
        return Finding(said, None, "", setting)
    codes = unpack(qweight[:, :rows].T, packing.bits, region.k_start, region.k)
    counts = torch.bincount(groups, minlength=stored.shape[1])
    # A histogram needs no wider copy of the codes, as their sum does
    numbers = torch.bincount(codes.view(-1), minlength=1 << packing.bits)
    total = (numbers * torch.arange(len(numbers), device=numbers.device)).sum().item()
    excess = total - (stored[:rows].long() * counts).sum().item()
    excess /= codes.numel()
    found = _named(offsets, excess, CLOSE)
    if found not in (None, said):
        raise WeightLoadError(
            f"{layer.module}.qzeros: found codes that average {excess:.2f} above the stored zero "
            f"points, where weights around zero average {packing.zero_offset} in {setting} {said} "
            f"and {offsets[found]} in {found}; set {setting} to {found} in the config"
        )
    why = f"codes average {excess:.2f} above the stored zero points"
    return Finding(said, found, why, setting)


def _named(offsets: dict[str, int], offset: float, tolerance: float) -> str | None:
    return next((name for name, known in offsets.items() if abs(offset - known) <= tolerance), None)
