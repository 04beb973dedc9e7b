"""The experts of a layer on a GPU: four launches, whatever the routing.

`routing.py` sorts the choices of all tokens by expert; the fused kernel multiplies the tokens of
each block by the way up of its expert and puts the activation on the sums before they are stored,
by position; again by the way down, whose rows it stores by slot; and each token's slots are added
in the order of its choices. No launch depends on data and nothing is read back, so a CUDA graph
replays for any routing. One token's experts are one slot each, so nothing is sorted for it.

Many tokens pass in parts (`choose.experts.pass_tokens`), all of one size and then a rest, through
buffers that PyTorch's allocator hands to one stream.
"""

import functools
from collections.abc import Callable

import torch
import triton

from fusedq_kernels.call import ExpertsCall
from fusedq_kernels.choose.device import device_behind
from fusedq_kernels.choose.experts import ExpertsLaunch, Load, pass_tokens, select
from fusedq_kernels.cuda.grouped import Product, Tensors
from fusedq_kernels.cuda.routed import Routed, Routing
from fusedq_kernels.cuda.routing import Router

Pass = Callable[..., None]


def prepare(call: ExpertsCall, multiply: object = None) -> Pass:
    """`run(x, topk_weights, topk_ids, expert_map, w13, w2, out)`; see `Kernel.prepare_experts`.

    On a GPU the device of x must be the current one. `multiply` is for kernels that call others.
    """

    @functools.lru_cache(maxsize=4096)
    def chosen(device: torch.device, load: Load) -> Pass:
        return one(select(call, load, device_behind(device, False)), load.top_k)

    @functools.cache
    def one(launch: ExpertsLaunch, top_k: int) -> Pass:
        return prepare_pass(call, launch, top_k)

    def run(
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        w13: Tensors,
        w2: Tensors,
        out: torch.Tensor,
    ) -> None:
        tokens, top_k = topk_ids.shape
        weights, ids = topk_weights.contiguous(), topk_ids.int().contiguous()
        places = None if expert_map is None else expert_map.int().contiguous()
        passes = triton.cdiv(tokens, pass_tokens(call.count, top_k))
        size = triton.cdiv(tokens, passes)
        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            load = Load(part.stop - start, top_k, call.count if places is None else len(places))
            operands = (x[part], weights[part], ids[part], places, w13, w2, out[part])
            chosen(x.device, load)(*operands)

    return run


def prepare_pass(call: ExpertsCall, launch: ExpertsLaunch, top_k: int) -> Pass:
    """`run(x, topk_weights, topk_ids, expert_map, w13, w2, out)` of one pass by one launch.

    As `prepare`, for at most `pass_tokens`; ids and map are int32, and all are contiguous.
    """
    up, down = Product(call.up, launch.up, call.count), Product(call.down, launch.down, call.count)
    router = Router(call.count, top_k, launch.block_m)

    def run(
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        w13: Tensors,
        w2: Tensors,
        out: torch.Tensor,
    ) -> None:
        slots, (*_, up_order), (*_, down_order) = topk_ids.numel(), w13, w2
        in_order = up_order is None and down_order is None
        alone = len(topk_ids) == 1 and expert_map is None and in_order
        routing = Routing(None, topk_ids[0]) if alone else router.sort(topk_ids, expert_map)
        like = {"dtype": x.dtype, "device": x.device}
        if up_order is not None:
            x = router.reorder(x, up_order, routing, slots, x_sorted=False)
        inner = torch.empty((routing.blocks * launch.block_m, call.down.in_features), **like)
        way = Routed(top_k, alone, up_order is not None, True, call.activation)
        up(x, w13, inner, routing, slots, way)
        if down_order is not None:
            inner = router.reorder(inner, down_order, routing, slots, x_sorted=True)
        y = torch.empty((slots, call.down.n), **like)
        down(inner, w2, y, routing, slots, Routed(1, alone, x_sorted=True))
        router.sum(y, topk_weights, topk_ids, expert_map, out)

    return run
