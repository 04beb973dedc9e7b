"""The guard passes every right launch of experts, and says where and how a wrong one is wrong."""

from dataclasses import replace

import pytest
import torch

from expert_layers import COUNT, HIDDEN, Layer
from fusedq_kernels import guard, guard_experts, reference
from fusedq_kernels.activation import SILU, Activation
from fusedq_kernels.choose.experts import ExpertsLaunch
from fusedq_kernels.cuda.routing import Router
from fusedq_kernels.experts import ResidentExperts, Stack
from fusedq_kernels.guard_experts import check, truths
from fusedq_kernels.types import QuantSpec, TileConfig, WeightType
from fusedq_kernels.warmup import ReachedExperts

TOP_K = 2
EXACT = TileConfig(8, 128, 1, 4, 2)
SCALED = TileConfig(32, 64, 1, 4, 2, scale_weights=True)
SPLIT = TileConfig(8, 64, 2, 4, 2)


def experts(
    activation: Activation = SILU,
    dtype: torch.dtype = torch.float16,
    places: int | None = None,
    scale_dtype: torch.dtype = torch.float16,
    **options,
) -> ResidentExperts:
    spec = QuantSpec(WeightType.UINT4B8, 32, scale_dtype)
    layer = Layer(spec, dtype, activation=activation, kernel="triton-gemm", **options)
    return ResidentExperts(layer.call, Stack.of(layer.w13), Stack.of(layer.w2), TOP_K, places)


def reached(tile: TileConfig, tokens: int, most: int | None = None) -> ReachedExperts:
    launch = ExpertsLaunch(tile, tile, "test")
    return ReachedExperts("triton-gemm", tokens, most or tokens, launch)


def compared(
    resident: ResidentExperts, tile: TileConfig, tokens: int, most: int | None = None
) -> guard.Difference | None:
    return check(reached(tile, tokens, most), resident, truths(resident))


@pytest.mark.parametrize(
    ("tile", "activation", "dtype", "places", "biased"),
    [
        (EXACT, SILU, torch.float16, None, False),
        (SPLIT, Activation("silu", 1.0, 1.702, 1.0), torch.bfloat16, 9, True),
        (SCALED, Activation("relu2_no_mul"), torch.float16, None, False),
        (SCALED, Activation("situ", 2.0, 1.5), torch.bfloat16, None, True),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_a_right_launch_passes(tile, activation, dtype, places, biased) -> None:
    hidden = 384 if tile is SPLIT else HIDDEN
    resident = experts(activation, dtype, places, hidden=hidden)
    if biased:
        generator = torch.Generator().manual_seed(5)
        biases = [
            torch.randn((COUNT, of.n), generator=generator).to(dtype)
            for of in (resident.call.up, resident.call.down)
        ]
        w13, w2 = (
            stack._replace(bias=bias)
            for stack, bias in zip((resident.w13, resident.w2), biases, strict=True)
        )
        resident = replace(resident, w13=w13, w2=w2)
    assert compared(resident, tile, 1, most=12) is None


def test_the_truth_is_the_oracles() -> None:
    """Which reads the weights as they were before they were packed and stacked."""
    spec = QuantSpec(WeightType.UINT4, 32, torch.float16)
    layer = Layer(spec, kernel="triton-gemm")
    resident = ResidentExperts(layer.call, Stack.of(layer.w13), Stack.of(layer.w2), TOP_K, 8)
    for truth in truths(resident):
        ids = truth.choices.ids.tolist()
        numbers = {8 - COUNT + place: expert for place, expert in layer.weights.items()}
        expected = reference.experts(truth.x, truth.choices.weights, truth.choices.ids, numbers)
        torch.testing.assert_close(truth.sums.sums, expected, rtol=1e-12, atol=1e-12)
        assert all(len(set(each)) == TOP_K for each in ids)
    spread_out, crowded = (set(t.choices.ids.unique().tolist()) for t in truths(resident))
    assert (spread_out, crowded) == (set(range(8)), {6, 7})


@pytest.mark.parametrize("tile", [EXACT, SCALED], ids=["exact", "scaled"])
def test_the_bound_is_near_what_right_launches_need(tile: TileConfig) -> None:
    """A thirtieth of it would refuse them, and it is a small part of an output."""
    resident = experts()
    truth, _ = truths(resident)
    y = torch.empty_like(truth.x)
    run = resident.kernel.prepare_expert_pass(resident.call, reached(tile, 61).launch, TOP_K)
    choices = truth.choices
    run(truth.x, choices.weights, choices.ids, None, resident.w13, resident.w2, y)
    allowed = guard_experts.tolerance(reached(tile, 61), resident, truth, y.numel())
    worst = ((y.double() - truth.sums.sums).abs() / allowed).max().item()
    assert 0.03 < worst < 1
    assert allowed.mean() < 0.02 * truth.sums.sums.square().mean().sqrt()


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that is left out of a sum, bits that change, memory behind the tokens."""
    resident, real, calls = experts(), Router.sum, []

    def leaving_out(self, y, topk_weights, topk_ids, expert_map, out) -> None:
        topk_weights = topk_weights.clone()
        topk_weights[2, 1] = 0
        real(self, y, topk_weights, topk_ids, expert_map, out)

    monkeypatch.setattr(Router, "sum", leaving_out)
    found = compared(resident, EXACT, 4)
    assert found.wrong > HIDDEN // 2
    assert (found.unlike, found.behind) == (0, 0)
    assert "outputs wrong (the worst: token 2, output " in str(found)

    def changing(self, y, topk_weights, topk_ids, expert_map, out) -> None:
        real(self, y, topk_weights, topk_ids, expert_map, out)
        calls.append(1)
        if len(calls) % 2:
            out.view(torch.int16)[1, 3] ^= 1
        out.as_strided((len(out) + 1, HIDDEN), (HIDDEN, 1))[-1, 7] = 0

    monkeypatch.setattr(Router, "sum", changing)
    found = compared(resident, EXACT, 4)
    assert (found.wrong, found.unlike, found.behind) == (0, 1, 2)


def test_only_full_blocks_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that all ask the same experts fill them; few tokens of different ones do not."""
    resident, real = experts(), Router.sort

    def forgetting(self, topk_ids, expert_map):
        found = real(self, topk_ids, expert_map)
        if len(topk_ids) >= 8:
            # The last row of the first block
            found.slots[7] = topk_ids.numel()
        return found

    monkeypatch.setattr(Router, "sort", forgetting)
    assert compared(resident, EXACT, 2, most=7) is None
    found = compared(resident, EXACT, 2, most=50)
    assert found.wrong > HIDDEN // 2


@pytest.mark.parametrize("which", ["w13", "w2"])
def test_one_wrong_weight_of_the_last_expert_is_seen(which: str) -> None:
    resident = experts(hidden=128)
    known = truths(resident)
    weight = getattr(resident, which).qweight
    weight[COUNT - 1, 0, 40, 12] ^= 8
    found = check(reached(EXACT, 20), resident, known)
    assert found.wrong > 0


def test_an_output_too_large_for_its_dtype_is_not_judged() -> None:
    resident = experts(scale_dtype=torch.float32)
    resident.w2.scales[:, :, 5] *= 1e6
    assert compared(resident, EXACT, 9) is None
    (truth, _), launch = truths(resident), reached(EXACT, 9)
    allowed = guard_experts.tolerance(launch, resident, truth, 9 * HIDDEN)
    assert allowed[:, 5].isinf().any()
    assert not allowed[:, 6].isinf().any()


def test_a_launch_is_told() -> None:
    assert str(reached(SPLIT, 1)) == (
        "triton-gemm 8x64, 2 splits, 4 warps, 2 stages up and 8x64, 2 splits, 4 warps, 2 stages "
        "down (test) with 1 token"
    )
