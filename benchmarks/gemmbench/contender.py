"""What a measured kernel offers: a version, and a weight prepared in its own packed form."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, Protocol

import torch

from fusedq_kernels.types import LogicalWeight


class Unavailable(Exception):
    """This kernel cannot run here or not this weight; the message says why."""


class Prepared(NamedTuple):
    """One weight, packed.

    `run(x)` multiplies `[M, K]` tokens and returns `[M, N]`. `weight_bytes` is what one call reads
    of the weight, metadata included; `dram_bytes(m)` the least that a call moves through DRAM.
    `detail(m)` names what ran: a tile, a kernel that a library chose. Only what is `checked` must
    give the right answer, and also `with_bias(x, bias)` where there is one.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    weight_bytes: int
    dram_bytes: Callable[[int], int]
    detail: Callable[[int], str]
    checked: bool = True
    with_bias: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Contender(Protocol):
    """One line of the comparison."""

    name: str

    def version(self) -> str:
        """Package and version. Raises Unavailable where it is not installed or cannot load."""

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        """Pack `logical` on its device. Raises Unavailable for a scheme that it does not know."""


def package_version(distribution: str) -> str:
    """ "name version". Raises Unavailable where the distribution is not installed."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        raise Unavailable(f"{distribution} is not installed") from None


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def fused_dram_bytes(weight_bytes: int, n: int, k: int) -> Callable[[int], int]:
    """DRAM bytes by tokens when the weight, x and y (16 bit) each move once."""
    return lambda m: weight_bytes + 2 * m * (k + n)
