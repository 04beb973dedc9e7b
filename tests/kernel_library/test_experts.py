"""`fusedq::experts` against the oracle, and its checks."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from expert_layers import COUNT, HIDDEN, INNER, Layer, routing
from fusedq_kernels import experts, ops, reference, testing
from fusedq_kernels.activation import ACTIVATIONS, SILU, Activation
from fusedq_kernels.call import ALTERNATION, ExpertsCall
from fusedq_kernels.experts import Stack
from fusedq_kernels.layouts import stacked
from fusedq_kernels.types import LogicalWeight, QuantSpec, WeightType

SPEC = QuantSpec(WeightType.UINT4B8, 32, torch.float16)


@pytest.mark.parametrize("weight_type", WeightType, ids=lambda each: each.value)
@pytest.mark.parametrize("m", [1, 7])
def test_every_weight_type_is_near_the_oracle(weight_type: WeightType, m: int) -> None:
    layer = Layer(QuantSpec(weight_type, 32, torch.float16))
    x, weights, ids = routing(m)
    expected = reference.experts(x.half(), weights, ids, layer.weights)
    testing.assert_close(layer(x.half(), weights, ids), expected, 8e-3, 2e-3)


CURVES = [
    *(Activation(name, 1.5 if name == "swiglustep" else None) for name in ACTIVATIONS),
    Activation("silu", limit=0.7, alpha=1.702, beta=1.0),
    Activation("silu", limit=0.5),
    Activation("situ", limit=0.5, alpha=2.0),
]


@pytest.mark.parametrize("activation", CURVES, ids=str)
def test_every_activation(activation: Activation) -> None:
    layer = Layer(SPEC, activation=activation)
    x, weights, ids = routing(5)
    expected = reference.experts(x.half(), weights, ids, layer.weights, activation)
    testing.assert_close(layer(x.half(), weights, ids), expected, 8e-3, 2e-3)


def test_bfloat16_and_channel_scales() -> None:
    layer = Layer(QuantSpec(WeightType.UINT4B8, INNER * HIDDEN, torch.bfloat16), torch.bfloat16, 0)
    x, weights, ids = routing(6, top_k=3)
    expected = reference.experts(x.bfloat16(), weights, ids, layer.weights)
    testing.assert_close(layer(x.bfloat16(), weights, ids.long()), expected, 6e-2, 1.5e-2)


def test_ranks_of_experts_add_up() -> None:
    """Each rank holds some experts and leaves out those of the others."""
    layer = Layer(SPEC)
    x, weights, ids = routing(9, top_k=3, count=COUNT + 4)
    here = torch.tensor([-1, 2, 0, -1, 4, -1, -1, 1, -1], dtype=torch.int32)
    known = {number: layer.weights[i] for number, i in enumerate(here.tolist()) if i >= 0}
    y = layer(x.half(), weights, ids, here)
    testing.assert_close(y, reference.experts(x.half(), weights, ids, known), 8e-3, 2e-3)
    nowhere = torch.full_like(here, -1)
    assert not layer(x.half(), weights, ids, nowhere).any()


def test_ids_without_a_place_and_an_expert_chosen_twice() -> None:
    layer = Layer(SPEC)
    x, weights, ids = routing(4, top_k=3)
    ids = torch.tensor([[0, 0, 4], [-1, 2, COUNT], [3, 3, 3], [1, 2, -7]])
    expected = reference.experts(x.half(), weights, ids, layer.weights)
    testing.assert_close(layer(x.half(), weights, ids), expected, 8e-3, 2e-3)
    mapped = layer(x.half(), weights, ids, torch.arange(COUNT))
    assert torch.equal(mapped, layer(x.half(), weights, ids))


def test_all_tokens_of_one_expert_and_none_at_all() -> None:
    layer = Layer(SPEC)
    x, weights, _ = routing(12, top_k=1)
    ids = torch.full((12, 1), 3)
    expected = reference.experts(x.half(), weights, ids, layer.weights)
    testing.assert_close(layer(x.half(), weights, ids), expected, 8e-3, 2e-3)
    assert layer(x[:0].half(), weights[:0], ids[:0]).shape == (0, HIDDEN)


def test_orders_of_in_features() -> None:
    layer = Layer(SPEC, phase=0)
    generator = torch.Generator().manual_seed(5)

    def ordered(weight: LogicalWeight, perm: torch.Tensor) -> LogicalWeight:
        return replace(weight, perm=perm.int())

    orders = [
        (torch.randperm(HIDDEN, generator=generator), torch.randperm(INNER, generator=generator))
        for _ in range(COUNT)
    ]
    layer.weights = {
        number: reference.Expert(
            ordered(e.gate, outer), ordered(e.up, outer), ordered(e.down, inner)
        )
        for (number, e), (outer, inner) in zip(layer.weights.items(), orders, strict=True)
    }
    layer.w13 = replace(layer.w13, perm=torch.stack([o.int() for o, _ in orders]))
    layer.w2 = replace(layer.w2, perm=torch.stack([i.int() for _, i in orders]))
    x, weights, ids = routing(6)
    expected = reference.experts(x.half(), weights, ids, layer.weights)
    testing.assert_close(layer(x.half(), weights, ids), expected, 8e-3, 2e-3)


def test_biases() -> None:
    """A bias of w13 lies in the order of its rows."""
    layer = Layer(SPEC)
    layer.w13.qweight.zero_(), layer.w13.scales.zero_()
    x, weights, ids = routing(3, top_k=1)
    gate, up = torch.full((INNER,), 2.0), torch.linspace(-1, 1, INNER)
    bias = stacked.alternate(gate, up).half().expand(COUNT, -1).contiguous()
    back = torch.linspace(-2, 2, HIDDEN).half().expand(COUNT, -1).contiguous()
    y = experts.experts(
        *(x.half(), weights, ids, None),
        *(Stack.of(layer.w13, bias), Stack.of(layer.w2, back), layer.call),
    )
    hidden = (2 / (1 + torch.exp(torch.tensor(-2.0))) * up).half()
    products = [
        ops.matmul(hidden[None], layer.w2.expert(int(each)), back[0], "cpu-striped").float()
        for each in ids[:, 0]
    ]
    testing.assert_close(y, weights * torch.cat(products), 5e-3, 2e-3)


def test_rows_alternate_by_8() -> None:
    gate, up = torch.arange(24), torch.arange(100, 124)
    rows = stacked.alternate(gate, up)
    assert rows.tolist()[:16] == [*range(8), *range(100, 108)]
    assert rows.tolist()[16:24] == list(range(8, 16))
    halves = stacked.apart(rows[None].expand(3, -1))
    for half, whole in zip(halves, (gate, up), strict=True):
        assert torch.equal(half.flatten(1)[1], whole)
    assert ALTERNATION == 8


def test_an_expert_is_a_view_of_the_stack() -> None:
    w13 = Layer(SPEC).w13
    packed = w13.expert(2)
    assert packed.qweight.data_ptr() == w13.qweight[2].data_ptr()
    assert packed.scales.data_ptr() == w13.scales[2].data_ptr()
    assert packed.qweight.is_contiguous()
    assert (packed.n, packed.k, w13.count) == (2 * INNER, HIDDEN, COUNT)


def test_a_call_of_experts_has_one_text() -> None:
    call = Layer(SPEC).call
    assert ExpertsCall.parse(call.text) == call
    clamped = replace(call, activation=Activation("silu", limit=7.0, alpha=1.702, beta=1.0))
    assert ExpertsCall.parse(clamped.text) == clamped
    assert "5 experts, silu limit 7.0 alpha 1.702 beta 1.0: cpu-striped" in clamped.text
    assert call.text.startswith("5 experts, silu: cpu-striped P4 uint4b8 g32 phase 0 float16 [96 ")
    with pytest.raises(ValueError, match="is no call of experts; one reads '8 experts, silu: "):
        ExpertsCall.parse(call.up.text)
    with pytest.raises(ValueError, match=r"up .* and down .* are not of one expert"):
        ExpertsCall(5, SILU, call.up, call.up)


def test_a_graph_knows_its_shape() -> None:
    layer = Layer(SPEC)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty((3, HIDDEN), dtype=torch.float16)
        weights, ids = torch.empty((3, 2)), torch.empty((3, 2), dtype=torch.int32)
        stacks = [
            Stack(*(torch.empty(t.shape, dtype=t.dtype) for t in (w.qweight, w.scales)))
            for w in (layer.w13, layer.w2)
        ]
        y = experts.experts(x, weights, ids, None, *stacks, layer.call)
    assert (y.shape, y.dtype) == ((3, HIDDEN), torch.float16)


def test_operands_of_other_experts_are_refused() -> None:
    layer = Layer(SPEC)
    x, weights, ids = routing(3)
    x = x.half()
    for wrong, message in (
        ((x.float(), weights, ids), r"x must be torch.float16 \[M, 64\], got torch.float32"),
        (
            (x[:, :32], weights, ids),
            r"x must be torch.float16 \[M, 64\], got torch.float16 \[3, 32",
        ),
        ((x, weights.half(), ids), "topk_weights must be torch.float32"),
        ((x, weights[:, :1], ids), r"topk_weights must be torch.float32 \[3, 2\]"),
        ((x, weights, ids.float()), "topk_ids must be int32 or int64, got torch.float32"),
        ((x, weights[:2], ids[:2]), r"topk_ids must be \[M, top_k\], got \[2, 2\]"),
        ((x, weights, ids, ids), r"expert_map must be \[experts\], got \[3, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*wrong)
    fewer = replace(layer.w2, qweight=layer.w2.qweight[:-1])
    for stacks, message in (
        ((Stack.of(layer.w13), Stack.of(fewer)), r"w2_qweight must be torch.int32 \[5, "),
        (
            (Stack.of(layer.w13, weights), Stack.of(layer.w2)),
            r"w13_bias must be torch.float16 \[5, 96",
        ),
        ((Stack.of(layer.w13)._replace(zeros=ids), Stack.of(layer.w2)), "w13_zeros must be absent"),
        (
            (Stack.of(layer.w13)._replace(perm=ids), Stack.of(layer.w2)),
            r"w13_perm must be torch.int32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            experts.experts(x, weights, ids, None, *stacks, layer.call)


def test_kernels_that_run_no_experts_are_refused() -> None:
    call = Layer(SPEC).call
    other = replace(call, up=replace(call.up, kernel="sliced-cublas"))
    with pytest.raises(
        ValueError, match=r"kernel sliced-cublas runs no experts; supported: .*cpu-"
    ):
        experts.prepared_experts(other.text)
    with pytest.raises(ValueError, match=r"activation must be one of silu, gelu, .* got relu6"):
        experts.prepared_experts(call.text.replace("silu", "relu6"))
