"""How the sliced kernel cuts a weight along N: plain arithmetic, for planning without Triton.

`cuda/sliced.py` runs the slices.
"""

from fusedq_kernels.geometry import BLOCK_N, round_up

# Between half and two thirds of the L2 of an H100 or H200: a slice is read back from there.
SLICE_BYTES = 32 << 20

_WEIGHT_BYTES = 2


def slice_rows(n: int, k: int) -> int:
    """Outputs per slice; the last slice of a weight `[n, k]` may have fewer.

    The slices are as few as SLICE_BYTES allow and nearly of one size.
    """
    most = max(1, SLICE_BYTES // (_WEIGHT_BYTES * k))
    unit = BLOCK_N if most >= BLOCK_N else 1
    count = -(-n // (most // unit * unit))
    return min(n, round_up(-(-n // count), unit))


def workspace_bytes(n: int, k: int) -> int:
    """Bytes of the one workspace that all slices of a weight `[n, k]` use in turn."""
    return _WEIGHT_BYTES * slice_rows(n, k) * k
