"""The whole right answer of a problem, and how far from it a kernel may be."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fusedq_kernels import reference
from fusedq_kernels.guard import spreads
from fusedq_kernels.layouts.packing import stripes
from fusedq_kernels.types import LogicalWeight

# Outputs of 16-bit kernels differ from float64 by about 2e-3 RMS (rounding of y, of scaled weights,
# of scales to the activation dtype); a wrong order of codes, groups or zero points by about 1.
MAX_RMS_ERROR = 1e-2
_TOKENS = 512


class Errors(NamedTuple):
    """RMS error relative to the RMS of the answer, inf for NaN; outputs that are wrong, of all."""

    rms: float
    wrong: int
    outputs: int

    @property
    def verdict(self) -> str:
        """What is wrong, empty if nothing is."""
        if self.rms > MAX_RMS_ERROR:
            return f"RMS error {self.rms:.2e}, at most {MAX_RMS_ERROR:.0e}"
        return f"{self.wrong} of {self.outputs} outputs wrong" if self.wrong else ""


class Answer:
    """`x @ weight.T` for tokens x `[M, K]`, every output, in float64."""

    def __init__(self, x: torch.Tensor, logical: LogicalWeight) -> None:
        exact = x.double()
        parts, norms = [], []
        for rows in _rows(logical):
            weight = reference.dequantize(rows, x.dtype).double()
            parts.append(exact @ weight.t())
            norms.append(weight.norm(dim=1))
        self.sums = torch.cat(parts, dim=1)
        # The RMS of an output over tokens of this length that point anywhere
        self._rms = (exact.norm(dim=1) / x.shape[1] ** 0.5)[:, None], torch.cat(norms)

    def errors(self, y: torch.Tensor, bias: torch.Tensor | None = None) -> Errors:
        """Of outputs `[M, N]` to which a bias was added, or none.

        One output is wrong where its error is so many times what MAX_RMS_ERROR stands for as not
        even the largest of so many outputs would be by chance.
        """
        outputs, squares, size, wrong = y.numel(), 0.0, 0.0, 0
        for start in range(0, y.shape[0], _TOKENS):
            part = slice(start, start + _TOKENS)
            expected = self.sums[part] if bias is None else self.sums[part] + bias.double()
            error = (y[part].double() - expected).abs_().nan_to_num_(nan=torch.inf)
            limit = self._rms[0][part] * self._rms[1] * (MAX_RMS_ERROR * spreads(outputs))
            # A bias is rounded with the sum
            limit += expected.abs() * torch.finfo(y.dtype).eps
            wrong += int((error > limit).sum())
            squares += error.square().sum().item()
            size += expected.square().sum().item()
        return Errors((squares / size) ** 0.5, wrong, outputs)


def _rows(logical: LogicalWeight) -> Iterator[LogicalWeight]:
    n, k = logical.codes.shape
    for start, stop in stripes(n, k, logical.codes.device):
        zeros = None if logical.zeros is None else logical.zeros[start:stop]
        codes, scales = logical.codes[start:stop], logical.scales[start:stop]
        yield replace(logical, codes=codes, scales=scales, zeros=zeros)
