"""What the operators of `torch.ops.fusedq` do beside tensors: one value, and its text.

The text is an argument of the operators, so that a traced graph and a profile say what a plan says:

    triton-gemm P4 uint4 g128 phase 64 float16 [4096 x 2048] bfloat16
    cpu-striped P8 uint8b128 g32 phase 0 float32 [512 x 1056] reading 1024 float16 batch-invariant

that is kernel, layout, weight type, group size, phase, scales' dtype, N x K, the number of features
that tokens have where a `perm` makes it another than K, the dtype of activations, and what of the
`Policy` is not the default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

SCALE_DTYPES = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32)
ACT_DTYPES = (DType.FLOAT16, DType.BFLOAT16)

_TEXT = re.compile(
    r"(?P<kernel>\S+) (?P<layout>\S+) (?P<weight_type>\S+) g(?P<group_size>\d+)"
    r" phase (?P<phase>\d+) (?P<scale_dtype>\S+) \[(?P<n>\d+) x (?P<k>\d+)\]"
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
            f"phase {self.phase} {spec.scale_dtype} [{self.n} x {self.k}]",
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
            spec=QuantSpec(weight_type, int(word["group_size"]), scale_dtype),
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


_EXAMPLE = Call(
    *("triton-gemm", Layout.P4, QuantSpec(WeightType.UINT4, 128, DType.FLOAT16)),
    *(4096, 4096, 0, 4096, DType.BFLOAT16),
)
