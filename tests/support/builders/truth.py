"""What a quantized linear means, and the arithmetic of packing its integers into words.

Shares nothing with the code under test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """What a quantized linear means: codes `[N, K]`, zeros `[N, G]` or None, scales `[N, G]`.

    `g_idx` `[K]` is the group of each in_feature; None means `k // group_size`. Codes and zeros are
    unsigned, of `bits` bits; without zeros half of their range is subtracted.
    """

    codes: np.ndarray
    zeros: np.ndarray | None
    scales: torch.Tensor
    group_size: int
    g_idx: np.ndarray | None = None
    bits: int = 4

    @property
    def half(self) -> int:
        return 2 ** (self.bits - 1)

    def values(self, n0: int, n1: int, k0: int, k1: int) -> torch.Tensor:
        """What a region is worth, fp64; exact."""
        group_of = np.arange(self.codes.shape[1]) // self.group_size
        group_of = (group_of if self.g_idx is None else self.g_idx)[k0:k1]
        zeros = self.half
        if self.zeros is not None:
            zeros = self.zeros[n0:n1][:, group_of].astype(np.float64)
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].astype(np.float64) - zeros)
        return codes * self.scales[n0:n1][:, group_of].double()

    def slice(
        self, n0: int, n1: int, k0: int, k1: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Codes, zeros and scales of a region in 4 or 8 bits, with every group that it touches."""
        groups = slice(k0 // self.group_size, -(-k1 // self.group_size))
        zeros = None if self.zeros is None else torch.from_numpy(self.zeros[n0:n1, groups].copy())
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].copy())
        if zeros is None:
            codes += (8 if self.bits <= 4 else 128) - self.half
        return codes, zeros, self.scales[n0:n1, groups].contiguous()


def random_truth(
    n: int,
    k: int,
    group_size: int,
    *,
    zero_range: tuple[int, int] | None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    bits: int = 4,
) -> Truth:
    """Random codes, scales and, in `zero_range`, zero points; None makes a symmetric weight."""
    rng = np.random.default_rng(seed)
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    zeros = None
    if zero_range:
        zeros = rng.integers(zero_range[0], zero_range[1] + 1, (n, groups), dtype=np.uint8)
    return Truth(
        codes=rng.integers(0, 2**bits, (n, k), dtype=np.uint8),
        zeros=zeros,
        scales=torch.from_numpy(rng.uniform(0.01, 0.02, (n, groups))).to(dtype),
        group_size=group_size,
        bits=bits,
    )


@dataclass(frozen=True)
class Build:
    """One flavour of a format: how its tensors are stored and what its config says.

    `zero_range` None stands for every zero point of `bits` bits. N and K are multiples of `unit`.
    """

    symmetric: bool
    tensors: Callable[[Truth], Tensors]
    config: Callable[[int], dict[str, Any]]
    zero_range: tuple[int, int] | None = None
    ordered: bool = False
    bits: int = 4
    unit: int = 8

    def truth(
        self, n: int, k: int, group_size: int, seed: int = 0, dtype: torch.dtype = torch.float16
    ) -> Truth:
        zero_range = None if self.symmetric else self.zero_range or (0, 2**self.bits - 1)
        truth = random_truth(
            *(n, k, group_size), zero_range=zero_range, seed=seed, dtype=dtype, bits=self.bits
        )
        if not self.ordered:
            return truth
        # Layers that read one activation have one order: GPTQ takes it from the activation
        order = np.random.default_rng(k).permutation(k)
        return with_fields(truth, g_idx=order // truth.group_size)


def pack_along_columns(
    codes: np.ndarray, columns: Sequence[int] | None = None, bits: int = 4
) -> torch.Tensor:
    """`[R, C]` to int32 `[R, ceil(C / P)]`, P whole codes per word, the lowest bits first.

    Code i of word w is column `P * w + columns[i]`.
    """
    per_word = 32 // bits
    rows, width = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -width % per_word))).reshape(rows, -1, per_word)
    words = np.zeros(padded.shape[:2], dtype=np.uint32)
    for index, column in enumerate(columns or range(per_word)):
        words |= padded[:, :, column].astype(np.uint32) << np.uint32(bits * index)
    return torch.from_numpy(words.view(np.int32))


def pack_straddling(codes: np.ndarray, bits: int) -> torch.Tensor:
    """`[R, C]` to int32 `[R, ceil(C / 32) * bits]`: each row one stream of bits, lowest first."""
    rows, width = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -width % 32)))
    stream = np.unpackbits(padded[:, :, None], axis=2, count=bits, bitorder="little")
    octets = np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little")
    return torch.from_numpy(octets.view(np.int32))
