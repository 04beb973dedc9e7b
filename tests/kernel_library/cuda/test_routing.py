"""Slots sorted by expert, and tokens' sums, against plain Python."""

import pytest
import torch

from fusedq_kernels.cuda.routed import Routing
from fusedq_kernels.cuda.routing import Router
from fusedq_kernels.geometry import most_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNWRITTEN = -9


@pytest.fixture(autouse=True)
def unwritten(monkeypatch):
    """What is allocated holds neither a slot nor an expert."""
    allocate = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(UNWRITTEN)
    )


def expected(ids: list[int], here: dict[int, int], count: int, block_m: int):
    """The tables, entry by entry; `here` says where an id lies on this rank."""
    slots, experts = [], []
    for place in range(count):
        mine = [slot for slot, each in enumerate(ids) if here.get(each) == place]
        padding = -len(mine) % block_m
        slots += mine + [len(ids)] * padding
        experts += [place] * ((len(mine) + padding) // block_m)
    return slots, experts


def check(ids: torch.Tensor, count: int, block_m: int, places: list[int] | None = None) -> Routing:
    here = {i: i for i in range(count)}
    expert_map = None
    if places is not None:
        here = {number: place for number, place in enumerate(places) if place >= 0}
        expert_map = torch.tensor(places, dtype=torch.int32, device=DEVICE)
    slots, experts = expected(ids.flatten().tolist(), here, count, block_m)
    found = Router(count, ids.shape[1], block_m).sort(ids.int().to(DEVICE), expert_map)
    assert found.blocks == most_blocks(ids.numel(), count, block_m) >= len(experts)
    assert found.slots[: len(slots)].tolist() == slots
    assert found.experts.tolist() == experts + [-1] * (found.blocks - len(experts))
    return found


def chosen(tokens: int, top_k: int, all_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((tokens, all_experts), generator=generator).argsort(1)[:, :top_k]


@pytest.mark.parametrize("block_m", [8, 16, 128])
@pytest.mark.parametrize(
    ("tokens", "top_k", "count"),
    [(1, 8, 128), (2, 2, 8), (5, 2, 8), (8, 8, 60), (64, 8, 128), (9, 1, 31), (33, 6, 64)],
)
def test_slots_are_sorted_by_expert_and_then_by_number(tokens, top_k, count, block_m):
    check(chosen(tokens, top_k, count), count, block_m)


@pytest.mark.parametrize(
    ("tokens", "top_k", "count"), [(513, 1, 4), (200, 8, 384), (257, 4, 60), (700, 2, 8)]
)
def test_several_chunks_of_slots(tokens, top_k, count):
    check(chosen(tokens, top_k, count), count, 16)


@pytest.mark.parametrize("tokens", [3, 64, 130])
@pytest.mark.parametrize("rank", range(3))
def test_experts_of_other_ranks_get_no_block(tokens, rank):
    """Twenty experts on three ranks: seven, seven and six."""
    first, last = (7 * rank, min(7 * rank + 7, 20))
    places = [i - first if first <= i < last else -1 for i in range(20)]
    found = check(chosen(tokens, 6, 20), last - first, 16, places)
    assert found.experts.max() < last - first


def test_places_in_any_order():
    places = [3, -1, 0, 4, -1, 1, 2, -1]
    check(chosen(40, 3, 8), 5, 8, places)


def test_an_id_without_a_place_is_left_out():
    ids = torch.tensor([[0, -1, 9], [2, 2, 5], [1 << 20, 3, 4]])
    check(ids, 5, 8)
    check(ids, 2, 8, [0, 1, -1, -1, 7])


def test_all_tokens_at_one_expert_and_none_here():
    check(torch.full((70, 1), 3), 8, 16)
    check(torch.full((70, 2), 3), 4, 16, [0, 1, 2, -1, 3])


@pytest.mark.parametrize(
    ("ids", "count", "block_m"), [([0] * 9 + [1] * 9 + [2], 3, 8), ([0, 1, 2], 8, 16)]
)
def test_the_bound_is_reached(ids, count, block_m):
    """Each expert has one slot more than fills its blocks."""
    found = check(torch.tensor(ids)[:, None], count, block_m)
    assert (found.experts >= 0).all()


def test_the_same_tables_in_every_run():
    ids = chosen(150, 8, 32)
    first = check(ids, 32, 16)
    used = int((first.experts >= 0).sum()) * 16
    for _ in range(3):
        again = check(ids, 32, 16)
        assert torch.equal(again.slots[:used], first.slots[:used])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_takes_choices_in_their_order(dtype):
    """Terms of which fp32 keeps other bits in another order."""
    y = torch.tensor([[2.0**12], [2.0**-12], [-(2.0**12)], [2.0**-12]] * 2).expand(-1, 40)
    weights = torch.tensor([[2.0**12, 1.0, 2.0**12, 1.0], [1.0, 2.0**12, 1.0, 2.0**12]])
    totals = []
    for token in range(2):
        total = torch.zeros(())
        for choice in range(4):
            total = total + y[4 * token + choice, 0] * weights[token, choice]
        totals.append(total.item())
    assert totals[0] != totals[1]
    out = torch.empty((2, 40), dtype=dtype, device=DEVICE)
    ids = torch.zeros((2, 4), dtype=torch.int32, device=DEVICE)
    operands = (each.to(DEVICE) for each in (y.to(dtype).contiguous(), weights, ids))
    Router(1, 4, 8).sum(*operands, None, out)
    assert out.float().cpu().tolist() == [[total] * 40 for total in totals]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn((5 * 3, 1031), generator=generator).to(dtype)
    weights = torch.rand((5, 3), generator=generator)
    ids = torch.zeros((5, 3), dtype=torch.int32)
    out = torch.empty((5, 1031), dtype=dtype, device=DEVICE)
    Router(1, 3, 8).sum(*(each.to(DEVICE) for each in (y, weights, ids)), None, out)
    exact = (y.double().view(5, 3, -1) * weights.double()[..., None]).sum(1)
    # fp32 sums lie so near that rounding differs where a value is all but halfway.
    off = out.cpu().double() - exact
    ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=2.0**-14)
    assert (off.abs() <= ulp * 0.5001 + 1e-7).all()


def test_slots_of_other_ranks_are_never_read():
    y = torch.full((6, 16), torch.nan, dtype=torch.float16, device=DEVICE)
    y[1] = 2.0
    ids = torch.tensor([[0, 1], [2, 0], [-1, 5]], dtype=torch.int32, device=DEVICE)
    weights = torch.full((3, 2), 0.5, device=DEVICE)
    expert_map = torch.tensor([-1, 0, -1], dtype=torch.int32, device=DEVICE)
    out = torch.empty((3, 16), dtype=torch.float16, device=DEVICE)
    Router(1, 2, 8).sum(y, weights, ids, expert_map, out)
    assert out.tolist() == [[1.0] * 16, [0.0] * 16, [0.0] * 16]


@pytest.mark.parametrize("x_sorted", [False, True])
def test_rows_in_the_order_of_their_expert(x_sorted):
    generator = torch.Generator().manual_seed(1)
    ids = chosen(9, 2, 4)
    router = Router(4, 2, 8)
    routing = router.sort(ids.int().to(DEVICE), None)
    rows = len(routing.slots) if x_sorted else 9
    x = torch.randn((rows, 48), generator=generator).half().to(DEVICE)
    perm = torch.stack([torch.randperm(48, generator=generator)[:32] for _ in range(4)])
    out = router.reorder(x, perm.int().to(DEVICE), routing, 18, x_sorted)
    for position, slot in enumerate(routing.slots.tolist()):
        if routing.experts[position // 8] < 0 or slot == 18:
            continue
        row = position if x_sorted else slot // 2
        order = perm[routing.experts[position // 8]].to(DEVICE)
        assert torch.equal(out[position], x[row, order])
