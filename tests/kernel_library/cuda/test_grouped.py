"""The fused kernel for experts: each row by the weight of its expert, as the plain kernel does it.

In Triton's interpreter or on a GPU; `reference.py` is the oracle.
"""

from dataclasses import replace

import pytest
import torch

from expert_layers import alternating, stack
from fusedq_kernels import ops, reference, testing
from fusedq_kernels.activation import ACTIVATIONS, Activation
from fusedq_kernels.call import Call
from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.grouped import Product
from fusedq_kernels.cuda.routed import Routed, Routing
from fusedq_kernels.cuda.routing import Router
from fusedq_kernels.types import Launch, QuantSpec, StackedWeight, TileConfig, WeightType

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
COUNT = 3
BY_SLOT = Routed(1)
PER_CHANNEL = 4096


def tile(block_m=16, block_n=64, split_k=1, **options) -> TileConfig:
    return TileConfig(block_m, block_n, split_k, num_warps=4, num_stages=2, **options)


def experts_of(n, k, spec, phase=0, count=COUNT, act_dtype=HALF):
    """As the oracle takes them, and stacked."""
    weights = [testing.random_logical(n, k, spec, phase, seed) for seed in range(count)]
    stacked = stack(weights, act_dtype)
    moved = {name: getattr(stacked, name).to(DEVICE) for name in ("qweight", "scales")}
    return weights, replace(stacked, **moved)


def multiply(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: StackedWeight,
    chosen: TileConfig,
    routed: Routed = BY_SLOT,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows by slot, or by position with `routed.y_sorted`; what nobody wrote is NaN."""
    call = Call.of(weight.expert(0), "triton-gemm", x.dtype)
    top_k, ids = ids.shape[1], ids.int().to(DEVICE)
    router = Router(weight.count, top_k, chosen.block_m)
    routing = Routing(None, ids[0]) if routed.alone else router.sort(ids, None)
    slots, positions = ids.numel(), routing.blocks * chosen.block_m
    values = 2 if routed.activation is not None and routed.activation.is_gated else 1
    rows = positions if routed.y_sorted else slots
    y = torch.full((rows, weight.n // values), torch.nan, dtype=x.dtype, device=DEVICE)
    stacked = (weight.qweight, weight.scales, None, bias, None)
    Product(call, chosen, weight.count)(
        x.to(DEVICE), stacked, y, routing, slots, replace(routed, top_k=top_k)
    )
    if not routed.y_sorted:
        return y.cpu()
    # Back to slots, so that all is compared alike; the rest stays NaN.
    table = torch.arange(slots) * chosen.block_m if routed.alone else routing.slots.cpu()
    used = slots if routed.alone else int((routing.experts >= 0).sum()) * chosen.block_m
    back = torch.full((slots, y.shape[1]), torch.nan, dtype=x.dtype)
    for position, slot in enumerate(table[:used].tolist()):
        if routed.alone:
            back[position] = y[position * chosen.block_m]
        elif slot < slots:
            back[slot] = y[position]
        else:
            assert y[position].isnan().all()
    return back


def chosen_ids(tokens: int, top_k: int, count: int = COUNT, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((tokens, count), generator=generator).argsort(1)[:, :top_k]


def one_each(k: int, top_k: int = 1) -> torch.Tensor:
    """Experts in turn, so that each reads some of `k` one-hot tokens."""
    return (torch.arange(k * top_k) % COUNT).view(k, top_k)


# Each with one split and with two, in turn.
SPECS = [
    (QuantSpec(weight_type, group_size, scale_dtype), phase, 1 + (row + column) % 2)
    for row, (weight_type, scale_dtype) in enumerate(
        (
            (WeightType.UINT4, HALF),
            (WeightType.UINT4B8, HALF),
            (WeightType.UINT4B8, torch.float32),
            (WeightType.UINT8, torch.bfloat16),
            (WeightType.UINT8B128, HALF),
            (WeightType.NF4, torch.float32),
            (WeightType.FP4, torch.bfloat16),
        )
    )
    for column, (group_size, phase) in enumerate(
        ((32, 0), (64, 48), (128, 80), (PER_CHANNEL, 0), (32, 16))
    )
]


@pytest.mark.parametrize(("spec", "phase", "split_k"), SPECS, ids=str)
def test_one_hot_tokens_return_the_weight_of_their_expert(spec, phase, split_k):
    n, k = 72, 272
    weights, stacked = experts_of(n, k, spec, phase)
    ids = one_each(k)
    y = multiply(testing.one_hot(k), ids, stacked, tile(128, 128, split_k))
    exact = torch.stack([reference.dequantize(each, HALF).t().to(HALF) for each in weights])
    assert torch.equal(y, exact[ids[:, 0], torch.arange(k)])


@pytest.mark.parametrize(
    ("group_size", "phase"), [(8, 0), (24, 8), (48, 16), (256, 208), (PER_CHANNEL, 16)]
)
def test_other_groups_and_a_rank_that_starts_inside_one(group_size, phase):
    spec = QuantSpec(WeightType.UINT4B8, group_size, HALF)
    weights, stacked = experts_of(72, 400, spec, phase)
    y = multiply(testing.one_hot(400), one_each(400), stacked, tile(128, 128))
    exact = torch.stack([reference.dequantize(each).t().to(HALF) for each in weights])
    assert torch.equal(y, exact[torch.arange(400) % COUNT, torch.arange(400)])


@pytest.mark.parametrize("weight_type", WeightType)
@pytest.mark.parametrize("group_size", [32, 128])
def test_one_hot_is_exact_in_bfloat16(weight_type, group_size):
    spec = QuantSpec(weight_type, group_size, torch.bfloat16)
    weights, stacked = experts_of(72, 272, spec, 16, act_dtype=torch.bfloat16)
    x = testing.one_hot(272, dtype=torch.bfloat16)
    y = multiply(x, one_each(272), stacked, tile(128, 128))
    exact = torch.stack(
        [reference.dequantize(each, x.dtype).t().to(torch.bfloat16) for each in weights]
    )
    assert torch.equal(y, exact[torch.arange(272) % COUNT, torch.arange(272)])


TILES = [
    *(tile(8, 128), tile(16, 64), tile(16, 128, split_k=3), tile(64, 64, segments=2)),
    *(tile(64, 64, scale_weights=True), tile(32, 128, scale_steps=True)),
]


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("chosen", TILES, ids=repr)
@pytest.mark.parametrize("group_size", [32, 128])
def test_every_row_is_bit_for_bit_the_plain_kernels(chosen, group_size):
    n, k, tokens, top_k = 136, 528, 11, 2
    _, stacked = experts_of(n, k, QuantSpec(WeightType.UINT4B8, group_size, HALF), 16)
    x = torch.randn((tokens, k), generator=torch.Generator().manual_seed(0)).half()
    ids = chosen_ids(tokens, top_k)
    y = multiply(x, ids, stacked, chosen).view(tokens, top_k, n)
    for expert in range(COUNT):
        plain = ops.run(
            x.to(DEVICE), stacked.expert(expert), None, Launch("triton-gemm", chosen, "test")
        ).cpu()
        assert torch.equal(y[ids == expert], plain[(ids == expert).any(1)])


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize(("x_sorted", "y_sorted"), [(True, False), (True, True), (False, True)])
def test_rows_by_position_are_those_by_slot(x_sorted, y_sorted, split_k):
    _, stacked = experts_of(72, 272, QuantSpec(WeightType.UINT4, 64, HALF), 48)
    x = torch.randn((9, 272), generator=torch.Generator().manual_seed(3)).half()
    ids, chosen = chosen_ids(9, 2), tile(16, 64, split_k)
    by_slot = multiply(x, ids, stacked, chosen)
    if x_sorted:
        slots = Router(COUNT, 2, 16).sort(ids.int().to(DEVICE), None).slots.long()
        # Behind the last block lies anything, and rows of no slot are NaN.
        known = (slots >= 0) & (slots < 18)
        rows = torch.full((len(slots), 272), torch.nan, dtype=HALF)
        rows[known.cpu()] = x[slots[known].cpu() // 2]
        x = rows
    routed = Routed(1, x_sorted=x_sorted, y_sorted=y_sorted)
    assert torch.equal(multiply(x, ids, stacked, chosen, routed), by_slot)
    if x_sorted:
        described = replace(chosen, x_descriptor=True)
        assert torch.equal(multiply(x, ids, stacked, described, routed), by_slot)


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize(("block_m", "split_k"), [(64, 2), (32, 1)])
def test_a_token_alone_has_the_bits_it_has_among_others(block_m, split_k):
    _, stacked = experts_of(72, 400, QuantSpec(WeightType.UINT4B8, 32, HALF))
    x = torch.randn((5, 400), generator=torch.Generator().manual_seed(1)).half()
    ids, chosen = chosen_ids(5, 2), tile(block_m, 64, split_k)
    together = multiply(x, ids, stacked, chosen)
    for token in (0, 4):
        one = slice(token, token + 1)
        slots = together[2 * token : 2 * token + 2]
        assert torch.equal(multiply(x[one], ids[one], stacked, tile(16, 64, split_k)), slots)
        alone = multiply(x[one], ids[one], stacked, chosen, Routed(1, alone=True))
        assert torch.equal(alone, slots)
        sorted_alone = Routed(1, alone=True, y_sorted=True)
        assert torch.equal(multiply(x[one], ids[one], stacked, chosen, sorted_alone), slots)


def test_an_id_without_an_expert_writes_nothing():
    _, stacked = experts_of(72, 128, QuantSpec(WeightType.UINT4B8, 128, HALF))
    x = testing.one_hot(128, [5])
    ids = torch.tensor([[-1, 2, COUNT, 1 << 30]])
    for routed in (BY_SLOT, Routed(1, alone=True)):
        y = multiply(x, ids, stacked, tile(), routed)
        assert not y[1].isnan().any()
        assert y[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize("split_k", [1, 2])
def test_a_bias_of_each_expert(split_k):
    weights, stacked = experts_of(72, 272, QuantSpec(WeightType.UINT8B128, 64, HALF))
    bias = torch.linspace(-1, 1, COUNT * 72).half().view(COUNT, 72).to(DEVICE)
    ids = one_each(272)
    y = multiply(testing.one_hot(272), ids, stacked, tile(64, 128, split_k), bias=bias)
    exact = torch.stack([reference.dequantize(each).t() for each in weights])
    places = ids[:, 0]
    expected = exact[places, torch.arange(272)].double() + bias.cpu()[places].double()
    assert torch.equal(y, expected.float().half())


CURVES = [
    *(Activation(name, 0.01 if name == "swiglustep" else None) for name in ACTIVATIONS),
    Activation("silu", limit=0.02, alpha=1.702, beta=1.0),
    Activation("situ", limit=0.03, alpha=0.5),
]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", CURVES, ids=str)
def test_an_activation_is_taken_of_exact_sums(activation):
    spec = QuantSpec(WeightType.UINT4B8, 128, HALF)
    gates = [testing.random_logical(40, 272, spec, 0, seed) for seed in range(COUNT)]
    ups = [testing.random_logical(40, 272, spec, 0, 10 + seed) for seed in range(COUNT)]
    pairs = zip(gates, ups, strict=True)
    stacked = stack([alternating(*pair) for pair in pairs] if activation.is_gated else gates, HALF)
    moved = {name: getattr(stacked, name).to(DEVICE) for name in ("qweight", "scales")}
    ids = one_each(272)
    split_k = 1 + CURVES.index(activation) % 2
    routed = Routed(1, y_sorted=True, activation=activation)
    x = testing.one_hot(272) * 64
    y = multiply(x, ids, replace(stacked, **moved), tile(128, 128 // split_k, split_k), routed)
    sums = [
        torch.stack([64 * reference.dequantize(each).t().double() for each in some])[
            ids[:, 0], torch.arange(272)
        ]
        for some in (gates, ups)
    ]
    expected = reference.activate(activation, *sums)
    # fp32 functions of some steps, sums of terms no larger than 64 among them, one rounding.
    error = (y.double() - expected).abs()
    unit = torch.finfo(HALF).eps / 2
    assert (error <= 1.001 * unit * expected.abs() + 1e-5).all()
    assert expected.abs().max() > 1e-3


def test_nan_in_a_weight_is_not_clamped_away():
    _, stacked = experts_of(16, 128, QuantSpec(WeightType.UINT4B8, 128, HALF))
    stacked.scales.fill_(0x7E007E00)
    for activation in CURVES:
        routed = Routed(1, activation=activation)
        y = multiply(testing.one_hot(128, [3]), torch.tensor([[1]]), stacked, tile(), routed)
        assert y.isnan().all(), activation


def test_no_more_tiles_than_counters(monkeypatch):
    monkeypatch.setattr(gemm, "MAX_TILES", 5)
    _, stacked = experts_of(128, 256, QuantSpec(WeightType.UINT4B8, 128, HALF))
    with pytest.raises(ValueError, match="split_k 2 of 6 output tiles; at most 5 can be split"):
        multiply(testing.one_hot(256, [1, 2, 3]), one_each(3), stacked, tile(8, 64, split_k=2))


def test_a_tile_that_the_weight_cannot_have():
    _, stacked = experts_of(128, 256, QuantSpec(WeightType.UINT4B8, 128, HALF))
    with pytest.raises(ValueError, match="block_n 256 does not divide the padded N 128"):
        multiply(testing.one_hot(256, [1]), torch.tensor([[0]]), stacked, tile(16, 256))


def test_constants_say_what_differs():
    own = Routed(4, activation=Activation("silu", limit=7.0)).constants()
    assert own.keys() == Routed().constants().keys()
    assert (own["TOP_K"], own["LIMIT"], own["ALPHA"]) == (4, 7.0, 1.0)
    assert Routed().constants()["ACTIVATION"] is None
    assert set(own) <= set(gemm.fused_gemm_kernel.arg_names)
