"""Compares what a launch computes on this device with plain PyTorch, before it serves.

A compiler may turn a right kernel into a wrong one, for some tiles and not for others. So each
launch multiplies random tokens by the resident weight, twice: every output of every token must be
that of float64 within what rounding explains, the second run must give the same bits, and nothing
behind the last token may be written.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fusedq_kernels import ops, reference
from fusedq_kernels.catalogue import Kernel, Op
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import Launch, PackedWeight
from fusedq_kernels.warmup import Reached, ReachedExperts

# Distinct tokens; a batch repeats them. A prime: tokens of another tile are other ones.
TOKENS = 61
# Chance that right outputs of one launch are taken for wrong, if all roundings are at their worst.
FALSE_ALARM = 1e-6
# Rows behind the last token: those of the tallest tile.
_BEHIND = 256
# Exact in fp16 and bf16, and no likely output.
_UNTOUCHED = -21504.0
# float64 takes eight bytes of a code's one.
_NARROWER = 4


@dataclass(frozen=True, slots=True)
class Truth:
    """What a weight gives for TOKENS Gaussian tokens, whatever the launch.

    Attributes:
        x: `[TOKENS, K]` in the dtype of activations, in the order in which the weight is stored.
        bias: `[N]` in the dtype of activations.
        sums: `x @ weight.T` in float64, `[TOKENS, N]`.
        spread: root of the sum of all products' squares, `[TOKENS, N]`: by how much the sum changes
            where each product changes by its own size, up or down at random.
        rounding: the same where each changes by what rounding does to a scaled weight at most.
    """

    x: torch.Tensor
    bias: torch.Tensor
    sums: torch.Tensor
    spread: torch.Tensor
    rounding: torch.Tensor

    @classmethod
    def of(cls, packed: PackedWeight, act_dtype: torch.dtype) -> "Truth":
        """Computed on the device of `packed`, some rows at a time; the seed is fixed."""
        generator, device = torch.Generator().manual_seed(0), packed.qweight.device
        x, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(
                device, act_dtype
            )
            for shape in ((TOKENS, packed.k), (packed.n,))
        )
        return cls.of_tokens(x, bias, weights_of(packed, act_dtype))

    @classmethod
    def of_tokens(
        cls, x: torch.Tensor, bias: torch.Tensor, weights: Iterable[torch.Tensor]
    ) -> "Truth":
        """For other tokens `[M, K]` and a weight in stripes of rows, float64 `[rows, K]`."""
        exact, limits = x.double(), torch.finfo(x.dtype)
        squares, half_unit = exact.square(), limits.eps / 2
        found: list[list[torch.Tensor]] = [[], [], []]
        for weight in weights:
            found[0].append(exact @ weight.t())
            weight = weight.square()
            found[1].append((squares @ weight.t()).sqrt_())
            # Below the smallest normal number units do not shrink
            weight.clamp_(min=limits.smallest_normal**2).mul_(half_unit**2)
            found[2].append((squares @ weight.t()).sqrt_())
        return cls(x, bias, *(torch.cat(each, dim=1) for each in found))


def weights_of(packed: PackedWeight, act_dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The weight's rows in the order in which it is stored, some at a time: float64 `[rows, K]`."""
    device = packed.qweight.device
    for start, stop in packing.stripes(packed.n, packed.k * _NARROWER, device):
        logical = replace(packing.unpack_rows(packed, start, stop), perm=None, in_features=0)
        yield reference.dequantize(logical, act_dtype).double()


@dataclass(frozen=True, slots=True)
class Difference:
    """How a launch is wrong: how many of its outputs, and the worst of them.

    `wrong` outputs are further from the truth than rounding explains, `unlike` ones have other bits
    in a second run, `behind` values were written behind the last token.
    """

    reached: Reached | ReachedExperts
    outputs: int
    wrong: int
    unlike: int
    behind: int
    worst: str = ""

    def __str__(self) -> str:
        words = []
        if self.wrong:
            words.append(f"{self.wrong} of {self.outputs} outputs wrong (the worst: {self.worst})")
        if self.unlike:
            words.append(f"{self.unlike} of {self.outputs} outputs other ones in a second run")
        if self.behind:
            words.append(f"{self.behind} values written behind the last token")
        return ", ".join(words)


def check(
    reached: Reached, kernel: Kernel, packed: PackedWeight, truth: Truth
) -> Difference | None:
    """Run one launch twice with its fewest tokens, and with a whole tile of them; None if right.

    `truth` is `packed`'s. A weight's `perm` is not followed: the operator gathers, not the kernel.
    """
    if kernel.op is Op.EMBEDDING:
        return _check_lookup(reached, kernel, packed, truth.x.dtype)
    tile = reached.launch.tile
    tokens = {reached.tokens, max(reached.tokens, tile.block_m if tile is not None else 0)}
    found = (_check_tokens(reached._replace(tokens=m), packed, truth) for m in sorted(tokens))
    return next(filter(None, found), None)


def _check_tokens(reached: Reached, packed: PackedWeight, truth: Truth) -> Difference | None:
    m, n = reached.tokens, packed.n
    x = truth.x[torch.arange(m, device=truth.x.device) % TOKENS]
    bias = truth.bias if reached.has_bias else None
    memory = untouched(x, n)
    for each in memory:
        ops.run(x, packed, bias, reached.launch, out=each[:m])
    expected = truth.sums if bias is None else truth.sums + bias.double()
    allowed = tolerance(reached.launch, truth, expected, m * n, packed.k)
    return difference(reached, memory, m, expected, allowed)


def untouched(x: torch.Tensor, n: int) -> list[torch.Tensor]:
    """What two runs of tokens `x` write their `n` outputs into, with rows behind the last token."""
    return [x.new_full((len(x) + _BEHIND, n), _UNTOUCHED) for _ in range(2)]


def difference(
    reached: Reached | ReachedExperts,
    memory: Sequence[torch.Tensor],
    m: int,
    expected: torch.Tensor,
    allowed: torch.Tensor,
) -> Difference | None:
    """How two runs differ from what was expected; None where they do not.

    Args:
        memory: of each run, as `untouched` gave it.
        m: the number of tokens.
        expected, allowed: `[tokens, N]`, which the batch repeats.
    """
    n = expected.shape[1]
    parts, wrong = memory[0][:m].split(len(expected)), 0
    for part in parts:
        wrong += (_excess(part, expected, allowed) > 0).sum()
    unlike = (_bits(memory[0][:m]) != _bits(memory[1][:m])).sum()
    behind = sum((each[m:] != _UNTOUCHED).sum() for each in memory)
    counts = torch.stack([wrong, unlike, behind]).tolist()
    if not any(counts):
        return None
    return Difference(
        reached, m * n, *counts, _worst(parts, expected, allowed) if counts[0] else ""
    )


def _excess(part: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """By how much each output of some tokens is further from the truth than allowed."""
    limit = allowed[: len(part)]
    # What is not a number is infinitely wrong
    over = (part.double() - expected[: len(part)]).abs_().sub_(limit).nan_to_num_(torch.inf)
    return over.masked_fill_(limit.isinf(), 0)


def _worst(parts: tuple[torch.Tensor, ...], expected: torch.Tensor, allowed: torch.Tensor) -> str:
    excess = [_excess(part, expected, allowed) for part in parts]
    number = max(range(len(parts)), key=lambda index: excess[index].max().item())
    at = divmod(int(excess[number].argmax()), expected.shape[1])
    return (
        f"token {number * len(expected) + at[0]}, output {at[1]}: {parts[number][at].item():.6g}, "
        f"expected {expected[at].item():.6g} give or take {allowed[at].item():.1g}"
    )


def spreads(outputs: int) -> float:
    """How many spreads the largest of so many sums of random errors stays within (Hoeffding)."""
    return math.sqrt(2 * math.log(2 * outputs / FALSE_ALARM))


def adding(k: int) -> float:
    """How many of its spreads an fp32 sum of `k` products may be off, cut off after every eight."""
    return (k / 8 + 64) * torch.finfo(torch.float32).eps


def tolerance(
    launch: Launch, truth: Truth, expected: torch.Tensor, outputs: int, k: int
) -> torch.Tensor:
    """By how much each output may differ from `expected`, `[TOKENS, N]`.

    An output is rounded once to its dtype. A weight that is scaled before it is multiplied is
    rounded too, and the errors of K weights add up at random, to as many `spreads` as the largest
    of `outputs` sums may have. fp32 sums may be cut off instead of rounded
    (`adding`). cuBLAS may add parts of K, and then the bias, in 16 bits.
    """
    limits = torch.finfo(truth.x.dtype)
    half_unit, most = limits.eps / 2, spreads(outputs)
    allowed = expected.abs() * half_unit + truth.spread * adding(k)
    if launch.tile is None or launch.tile.scale_weights:
        allowed += truth.rounding * most
    if launch.tile is None:
        allowed += (truth.sums.abs() + truth.spread * most) * half_unit
    allowed += limits.smallest_normal * half_unit
    allowed *= 1 + limits.eps
    # What is too large for the dtype is infinite
    return allowed.masked_fill_(expected.abs() + allowed >= limits.max, torch.inf)


def _check_lookup(
    reached: Reached, kernel: Kernel, packed: PackedWeight, act_dtype: torch.dtype
) -> Difference | None:
    """Rows of an embedding are rounded once: nothing may differ."""
    device = packed.qweight.device
    ids = torch.linspace(0, packed.n - 1, TOKENS, dtype=torch.float64, device=device).long()
    rows = reference.dequantize(packing.gather(packed, ids), act_dtype).to(act_dtype)
    if packed.perm is not None:
        rows = torch.empty_like(rows).index_copy_(1, packed.perm.long(), rows)
    # An id that is none of the weight's gets zeros
    nothing = rows.new_zeros(1, rows.shape[1])
    ids, rows = torch.cat([ids, ids.new_tensor([packed.n])]), torch.cat([rows, nothing])
    found = [ops.embedding(ids, packed, kernel.name, act_dtype) for _ in range(2)]
    differs = (found[0] != rows).nonzero()
    unlike = int((_bits(found[0]) != _bits(found[1])).sum())
    if not len(differs) and not unlike:
        return None
    worst = ""
    if len(differs):
        token, column = differs[0].tolist()
        worst = (
            f"id {int(ids[token])}, column {column}: {found[0][token, column].item():.6g}, "
            f"expected {rows[token, column].item():.6g}"
        )
    return Difference(reached, rows.numel(), len(differs), unlike, 0, worst)


def _bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int16)
