"""Launches the fused kernel for experts: rows by the weight of the expert that each belongs to."""

import functools

import torch

from fusedq_kernels.call import Call
from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.arrivals import arrival_counters
from fusedq_kernels.cuda.gemm_kernel import fused_gemm_kernel
from fusedq_kernels.cuda.launcher import ALIGNMENT, Launcher
from fusedq_kernels.cuda.routed import Routed, Routing
from fusedq_kernels.geometry import BLOCK_N, group_geometry, round_up
from fusedq_kernels.types import TileConfig

Tensors = tuple[torch.Tensor | None, ...]


class Product:
    """Rows of x by the weights of their experts, with one tile."""

    def __init__(self, call: Call, tile: TileConfig, count: int) -> None:
        self.call, self.count = call, count
        self.groups = group_geometry(call.k, call.spec.group_size, call.phase)
        self.n_padded = round_up(call.n, BLOCK_N)
        self.tile = gemm.checked_tile(tile, self.n_padded, self.groups)
        self.of_weight = gemm.weight_arguments(call, self.groups, tile)
        self.launcher = functools.cache(self._launcher)

    def __call__(
        self,
        x: torch.Tensor,
        weight: Tensors,
        y: torch.Tensor,
        routing: Routing,
        slots: int,
        routed: Routed,
    ) -> None:
        """Fill the rows of `y` that belong to a slot; `gemm_kernel.py` says which row is which.

        Args:
            x: contiguous, `[rows, k]`.
            weight: the stacked qweight, scales, zeros, bias and perm.
            slots: how many there are.
            routed: where rows come from and go to.
        """
        qweight, scales, _, bias, _ = weight
        tile, k = self.tile, self.call.k
        if x.data_ptr() % ALIGNMENT:
            x = x.clone()
        # Blocks of one expert are neighbours, and read its weight at once.
        grid = gemm.launch_grid(routing.blocks * tile.block_m, self.n_padded, tile)
        partial = arrivals = None
        if tile.split_k > 1:
            gemm.check_tiles(grid[0] * grid[1], tile)
            size = (tile.split_k, slots, self.call.n)
            partial = torch.empty(size, dtype=torch.float32, device=x.device)
            arrivals = arrival_counters(x.device)
        tokens = gemm.described(x, k, tile, self.groups) if tile.x_descriptor else x
        places = qweight.data_ptr() | scales.data_ptr() | y.data_ptr()
        self.launcher(bias is not None, routed).launch(
            *(grid, places, tokens, qweight, scales, bias, y, partial, arrivals, slots),
            *(*self.of_weight, k, *routing, routing.blocks, self.count),
        )

    def _launcher(self, has_bias: bool, routed: Routed) -> Launcher:
        call, tile = self.call, self.tile
        dtype = call.dtype.torch
        constants = gemm.kernel_constants(call.spec, self.groups, tile, dtype, has_bias, routed)
        return Launcher(fused_gemm_kernel, constants, gemm.launch_options(tile))
