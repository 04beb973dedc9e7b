"""Which block of tokens goes to which expert, and the sum of what comes back.

A slot is `token * top_k + choice`. Slots are sorted by expert, in the order of slots within one,
and every expert's are filled up to whole blocks of positions, so that a block is of one expert.
Everything is counted in integers and has one order: the same tables on every run. How many blocks
there can be at most follows from shapes alone (`geometry.most_blocks`), so nothing is read back by
the host and a CUDA graph replays for any routing.

Slots are counted by chunks. One chunk, which is what decoding has, takes one launch of one program;
of more, a first launch counts each chunk's, and every program of the second adds up the counts of
all chunks (a few hundred kilobytes in L2) to know where its own slots begin.
"""

import functools
from collections.abc import Callable

import torch
import triton

from fusedq_kernels.choose.expert_memory import bins
from fusedq_kernels.choose.experts import CHUNK_SLOTS, FEW_SLOTS
from fusedq_kernels.cuda import routing_kernels
from fusedq_kernels.cuda.gemm import FP_FUSION
from fusedq_kernels.cuda.launcher import INTERPRETED, Launcher
from fusedq_kernels.cuda.routed import Routing
from fusedq_kernels.geometry import most_blocks

_FEW_WARPS, _WARPS = 4, 16
# Slots that each one is compared with at a time.
_BESIDE = 32
_COLUMNS = 1024
_COLUMN_WARPS = 4


class Router:
    """The tables of one layer and size of block, and the way back to tokens."""

    def __init__(self, count: int, top_k: int, block_m: int) -> None:
        self.count, self.top_k, self.block_m = count, top_k, block_m
        self.launcher = functools.cache(self._launcher)

    def sort(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> Routing:
        """The slots of `topk_ids`, int32 `[M, top_k]` and contiguous, by expert.

        With `expert_map`, int32, an id is a place in it. Ids without a place on this rank, and
        places that are none of `count`, are left out.
        """
        slots, has_map = topk_ids.numel(), expert_map is not None
        num_ids = len(expert_map) if has_map else 0
        blocks = most_blocks(slots, self.count, self.block_m)
        like = {"dtype": torch.int32, "device": topk_ids.device}
        found = Routing(
            torch.empty((blocks * self.block_m,), **like), torch.empty((blocks,), **like)
        )
        chunk = FEW_SLOTS if slots <= FEW_SLOTS else CHUNK_SLOTS
        chunks, width = triton.cdiv(slots, chunk), bins(self.count)
        constants = {"HAS_MAP": has_map, "CHUNK": chunk, "BLOCK_E": width}
        warps = _FEW_WARPS if chunk == FEW_SLOTS else _WARPS
        counts = None
        if chunks > 1:
            counts = torch.empty((chunks, width), **like)
            self.launcher(routing_kernels.count_kernel, _FEW_WARPS, **constants).launch(
                *((chunks, 1, 1), counts.data_ptr()),
                *(topk_ids, expert_map, counts, slots, num_ids, self.count),
            )
        constants |= {"COUNTED": chunks > 1, "BESIDE": _BESIDE, "BLOCK_M": self.block_m}
        self.launcher(routing_kernels.place_kernel, warps, **constants).launch(
            *((chunks, 1, 1), found.slots.data_ptr() | found.experts.data_ptr()),
            *(topk_ids, expert_map, counts, *found, slots, num_ids, self.count, blocks),
        )
        return found

    def sum(
        self,
        y: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Each token's slots, rows of `y` `[M * top_k, N]`, by their weights, fp32, into `out`."""
        (tokens, n), has_map = out.shape, expert_map is not None
        num_ids = len(expert_map) if has_map else 0
        constants = {"TOP_K": self.top_k, "HAS_MAP": has_map, "BLOCK_N": _COLUMNS}
        constants["INTERPRET"] = INTERPRETED
        self.launcher(routing_kernels.sum_kernel, _COLUMN_WARPS, **constants).launch(
            *((tokens, triton.cdiv(n, _COLUMNS), 1), y.data_ptr() | out.data_ptr()),
            *(y, topk_weights, topk_ids, expert_map, out, n, num_ids, self.count),
        )

    def reorder(
        self, x: torch.Tensor, perm: torch.Tensor, routing: Routing, slots: int, x_sorted: bool
    ) -> torch.Tensor:
        """Rows by position, each in the order of its expert: feature `perm[e, k]` as the k-th.

        Args:
            x: `[rows, features]`, rows by position with `x_sorted`, else by token.
            perm: int32 `[count, K]`.
            slots: how many there are.
        """
        rows = len(routing.slots)
        features, k = x.shape[1], perm.shape[1]
        out = torch.empty((rows, k), dtype=x.dtype, device=x.device)
        constants = {"TOP_K": self.top_k, "X_SORTED": x_sorted, "BLOCK_M": self.block_m}
        constants["BLOCK_K"] = _COLUMNS
        self.launcher(routing_kernels.reorder_kernel, _COLUMN_WARPS, **constants).launch(
            (routing.blocks, triton.cdiv(k, _COLUMNS), 1),
            x.data_ptr() | perm.data_ptr() | out.data_ptr(),
            *(x, perm, *routing, out, slots, features, k),
        )
        return out

    def _launcher(self, kernel: Callable[..., None], warps: int, **constants: object) -> Launcher:
        return Launcher(kernel, constants, {"num_warps": warps, "enable_fp_fusion": FP_FUSION})
