"""What the operators of `torch.ops.fusedq` do beside tensors: one value, and its text.

The text is an argument of the operators, so that a traced graph and a profile say what a plan says:

    triton-gemm P4 uint4 g128 phase 64 float16 [4096 x 2048] bfloat16
    cpu-striped P8 uint8b128 g32 phase 0 float32 [512 x 1056] reading 1024 float16 batch-invariant

that is kernel, layout, weight type, group size, phase, scales' dtype ("by rows" where each row has
a scale of its own beside), N x K, the number of features
that tokens have where a `perm` makes it another than K, the dtype of activations, and what of the
`Policy` is not the default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fusedq_kernels.activation import SILU, Activation
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    Layout,
    PackedWeight,
    Policy,
    QuantSpec,
    WeightType,
)

if TYPE_CHECKING:
    import torch

FLOAT_SCALES = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32)
NARROW_SCALES = (DType.FLOAT8_E4M3FN, DType.FLOAT8_E8M0FNU)
SCALE_DTYPES = (*FLOAT_SCALES, *NARROW_SCALES)
SCALES_OF = {
    each: FLOAT_SCALES[:2] if each.has_zero_points else FLOAT_SCALES for each in WeightType
}
# NVFP4, whose rows are scaled too, and MXFP4
SCALES_OF[WeightType.FLOAT4_E2M1F] = NARROW_SCALES
"""The dtypes of scales that a plan takes beside weights of each type."""
SCALED_BY_ROWS = (DType.FLOAT8_E4M3FN,)
"""Those of groups whose rows have a scale too; no others do."""
ACT_DTYPES = (DType.FLOAT16, DType.BFLOAT16)

# So many rows of gate, then as many of up, and so on: both of a pair lie in one thread of a tensor
# core, which holds rows r and r + 8.
ALTERNATION = 8

_EXPERTS_TEXT = re.compile(
    r"(?P<count>\d+) experts, (?P<activation>\w+)(?: limit (?P<limit>\S+))?"
    r"(?: alpha (?P<alpha>\S+))?(?: beta (?P<beta>\S+))?: (?P<up>[^;]+); (?P<down>[^;]+)"
)
_TEXT = re.compile(
    r"(?P<kernel>\S+) (?P<layout>\S+) (?P<weight_type>\S+) g(?P<group_size>\d+)"
    r" phase (?P<phase>\d+) (?P<scale_dtype>\S+)(?P<row_scaled> by rows)?"
    r" \[(?P<n>\d+) x (?P<k>\d+)\]"
    r"(?: reading (?P<in_features>\d+))? (?P<dtype>\S+)"
    r"(?P<invariant> batch-invariant)?(?P<unsliced> unsliced)?"
)


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's call of one kernel, whatever the number of tokens.

    `n`, `k`, `phase` and `in_features` are those of the `PackedWeight`; `dtype` is that of
    activations and results.
    """

    kernel: str
    layout: Layout
    spec: QuantSpec
    n: int
    k: int
    phase: int
    in_features: int
    dtype: DType
    policy: Policy = DEFAULT_POLICY

    def __post_init__(self) -> None:
        if self.dtype not in ACT_DTYPES:
            raise ValueError(f"x must be float16 or bfloat16, got {self.dtype}")
        if self.spec.scale_dtype not in SCALE_DTYPES:
            known = ", ".join(SCALE_DTYPES)
            raise ValueError(f"scale_dtype must be one of {known}, got {self.spec.scale_dtype}")

    @classmethod
    def of(
        cls,
        packed: PackedWeight,
        kernel: str,
        dtype: DType | torch.dtype,
        policy: Policy = DEFAULT_POLICY,
    ) -> Call:
        """The call of a kernel with this weight and activations of `dtype`."""
        size = (packed.n, packed.k, packed.phase, packed.in_features)
        return cls(kernel, packed.layout, packed.spec, *size, DType.of(dtype), policy)

    @property
    def text(self) -> str:
        spec = self.spec
        words = [
            f"{self.kernel} {self.layout.value} {spec.weight_type.value} g{spec.group_size}",
            f"phase {self.phase} {spec.scale_dtype}{' by rows' if spec.row_scaled else ''}",
            f"[{self.n} x {self.k}]",
        ]
        if self.in_features != self.k:
            words.append(f"reading {self.in_features}")
        words.append(self.dtype)
        if self.policy.batch_invariant:
            words.append("batch-invariant")
        if not self.policy.sliced_prefill:
            words.append("unsliced")
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> Call:
        """The call that `text` is of; ValueError, saying what is wrong, where it is of none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no call; one reads {_EXAMPLE.text!r}")
        word = match.groupdict()
        weight_type, scale_dtype = WeightType(word["weight_type"]), DType(word["scale_dtype"])
        return cls(
            kernel=word["kernel"],
            layout=Layout(word["layout"]),
            spec=QuantSpec(
                *(weight_type, int(word["group_size"]), scale_dtype),
                row_scaled=word["row_scaled"] is not None,
            ),
            n=int(word["n"]),
            k=int(word["k"]),
            phase=int(word["phase"]),
            in_features=int(word["in_features"] or word["k"]),
            dtype=DType(word["dtype"]),
            policy=Policy(word["invariant"] is not None, word["unsliced"] is None),
        )

    def packed(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        perm: torch.Tensor | None = None,
    ) -> PackedWeight:
        """The weight that these tensors are, which have been checked."""
        size = (self.n, self.k, self.phase, perm, self.in_features)
        return PackedWeight(qweight, scales, zeros, self.layout, self.spec, *size)


class Stacks(NamedTuple):
    """The two weights of the `count` experts of a rank, whatever activation is between them.

    That is enough to choose tiles and to count bytes; see `ExpertsCall`.
    """

    count: int
    up: Call
    down: Call


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """What the experts of one layer do on a rank, whatever the number of tokens.

    Each of the `count` experts multiplies by `up`, whose rows are those of gate (w1) and up (w3) in
    turn, `ALTERNATION` of each; one value for each pair of them, by the `activation`, is what
    `down` (w2) multiplies by. An activation that is not gated takes the rows of one matrix.
    """

    count: int
    activation: Activation
    up: Call
    down: Call

    def __post_init__(self) -> None:
        up, down = self.up, self.down
        values = 2 if self.activation.is_gated else 1
        outer, inner = (up.in_features, up.n), (down.n, values * down.in_features)
        if outer != inner or up.n % (values * ALTERNATION) or up.dtype != down.dtype:
            raise ValueError(
                f"up [{up.n} x {up.in_features}] {up.dtype} and down [{down.n} x "
                f"{down.in_features}] {down.dtype} are not of one expert"
            )

    @property
    def text(self) -> str:
        own, words = self.activation, [self.activation.name]
        words += [f"{field} {value}" for field, value in _options(own) if value is not None]
        return f"{self.count} experts, {' '.join(words)}: {self.up.text}; {self.down.text}"

    @classmethod
    def parse(cls, text: str) -> ExpertsCall:
        """The call that `text` is of; ValueError, saying what is wrong, where it is of none."""
        match = _EXPERTS_TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no call of experts; one reads {_EXPERTS.text!r}")
        up, down = Call.parse(match["up"]), Call.parse(match["down"])
        given = {name: match[name] for name in ("limit", "alpha", "beta")}
        options = {name: float(value) for name, value in given.items() if value is not None}
        return cls(int(match["count"]), Activation(match["activation"], **options), up, down)


def _options(activation: Activation) -> list[tuple[str, float | None]]:
    """Its numbers, None where they are those of a plain one."""
    plain = Activation(activation.name, limit=0.0)
    return [
        ("limit", activation.limit),
        ("alpha", None if activation.alpha == plain.alpha else activation.alpha),
        ("beta", None if activation.beta == plain.beta else activation.beta),
    ]


_EXAMPLE = Call(
    *("triton-gemm", Layout.P4, QuantSpec(WeightType.UINT4, 128, DType.FLOAT16)),
    *(4096, 4096, 0, 4096, DType.BFLOAT16),
)
_EXPERTS = ExpertsCall(
    *(8, SILU, _EXAMPLE),
    Call("triton-gemm", Layout.P4, _EXAMPLE.spec, 4096, 2048, 0, 2048, DType.BFLOAT16),
)
