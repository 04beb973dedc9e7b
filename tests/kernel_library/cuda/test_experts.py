"""A layer's experts by the fused kernel, in Triton's interpreter or on a GPU, and the oracle."""

from dataclasses import replace

import pytest
import torch

from expert_layers import COUNT, HIDDEN, INNER, Layer, routing
from fusedq_kernels import experts, reference, testing
from fusedq_kernels.activation import SILU, Activation
from fusedq_kernels.choose import experts as choice
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import experts as launches
from fusedq_kernels.experts import Stack
from fusedq_kernels.layouts import stacked
from fusedq_kernels.types import LogicalWeight, Policy, QuantSpec, WeightType

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
SPEC = QuantSpec(WeightType.UINT4B8, 32, HALF)


def most_errors(x, weights, ids, known) -> torch.Tensor:
    """Bounds of a layer with silu: what lies between the products, each slot and the sum are
    rounded once to the dtype of x, all else is fp32 in any order."""
    unit, tiny = torch.finfo(x.dtype).eps / 2, torch.finfo(x.dtype).smallest_normal * 2**-10
    single = 2.0**-23
    bound = torch.zeros(x.shape, dtype=torch.float64)
    for token, numbers in enumerate(ids.tolist()):
        sums = torch.zeros(x.shape[1], dtype=torch.float64)
        for place, number in enumerate(numbers):
            if number not in known:
                continue
            gate_w, up_w, down_w = (
                reference.dequantize(each, x.dtype).double() for each in known[number]
            )
            row = x[token].double()
            gate, up = gate_w @ row, up_w @ row
            off_gate, off_up = (
                len(row) * single * (each.abs() @ row.abs()) for each in (gate_w, up_w)
            )
            hidden = gate / (1 + torch.exp(-gate)) * up
            # silu is no steeper than 1.1 and no larger than its argument; some steps in fp32.
            off = 1.1 * off_gate * (up.abs() + off_up) + gate.abs() * off_up
            off = off + (unit + 8 * single) * (hidden.abs() + off) + tiny
            down = down_w.abs()
            off_y = down @ off + len(hidden) * single * (down @ (hidden.abs() + off))
            y = (down_w @ hidden).abs() + off_y
            weight = abs(weights[token, place].item())
            bound[token] += weight * (off_y + unit * y + tiny)
            sums += weight * y
        bound[token] += (unit + ids.shape[1] * single) * sums + tiny
    return bound


@pytest.fixture(autouse=True)
def unwritten(monkeypatch):
    """What is allocated holds NaN, or a number that is no slot and no expert."""
    allocate = torch.empty

    def empty(*args, **kwargs):
        made = allocate(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -9)

    monkeypatch.setattr(torch, "empty", empty)


def gpu_layer(spec=SPEC, dtype=HALF, phase=16, activation=SILU, **options) -> Layer:
    layer = Layer(spec, dtype, phase, activation, kernel="triton-gemm", **options)
    for name in ("w13", "w2"):
        weight = getattr(layer, name)
        moved = {field: getattr(weight, field).to(DEVICE) for field in ("qweight", "scales")}
        setattr(layer, name, replace(weight, **moved))
    return layer


def run(layer, x, weights, ids, expert_map=None) -> torch.Tensor:
    moved = (None if each is None else each.to(DEVICE) for each in (x, weights, ids, expert_map))
    return layer(*moved).cpu()


def check(layer, x, weights, ids, here=None, expert_map=None, activation=SILU) -> torch.Tensor:
    y = run(layer, x, weights, ids, expert_map)
    known = layer.weights if here is None else here
    expected = reference.experts(x, weights, ids, known, activation)
    if activation == SILU and all(each.perm is None for one in known.values() for each in one):
        errors, bounds = (y.double() - expected).abs(), most_errors(x, weights, ids, known)
        assert (errors <= bounds).all(), (errors / bounds).max()
    else:
        testing.assert_close(y, expected, 5e-3, 1e-3)
    return y


@pytest.mark.parametrize(
    ("spec", "dtype", "phase"),
    [
        (QuantSpec(WeightType.UINT4, 32, HALF), HALF, 16),
        (QuantSpec(WeightType.UINT4B8, 128, HALF), torch.bfloat16, 64),
        (QuantSpec(WeightType.UINT8B128, 64, torch.bfloat16), torch.bfloat16, 48),
        (QuantSpec(WeightType.UINT8, 64, HALF), HALF, 0),
        (QuantSpec(WeightType.NF4, 64, torch.float32), HALF, 0),
        (QuantSpec(WeightType.FP4, 4096, torch.float32), HALF, 0),
        (QuantSpec(WeightType.UINT4B8, 4096, HALF), HALF, 0),
        (QuantSpec(WeightType.UINT4B8, 24, HALF), HALF, 16),
    ],
    ids=str,
)
def test_every_weight_type_is_near_the_oracle(spec, dtype, phase):
    layer = gpu_layer(spec, dtype, phase)
    for tokens in (1, 6):
        x, weights, ids = routing(tokens)
        check(layer, x.to(dtype), weights, ids)


def test_other_activations_and_a_layer_that_is_not_gated():
    for activation in (Activation("silu", 0.7, 1.702, 1.0), Activation("relu2_no_mul")):
        layer = gpu_layer(activation=activation)
        x, weights, ids = routing(4)
        check(layer, x.half(), weights, ids, activation=activation)


def test_ranks_add_up_to_all_experts():
    """A rank leaves out the experts of others; one that holds none of those asked gives zero."""
    whole = gpu_layer(replace(SPEC, group_size=64))
    x, weights, ids = routing(7, top_k=3)
    x, total = x.half(), torch.zeros((7, HIDDEN), dtype=torch.float64)
    for here in ([0, 1, -1, -1, -1], [-1, -1, 0, 1, 2], [-1] * 5):
        places = [number for number, place in enumerate(here) if place >= 0]
        rank = gpu_layer(replace(SPEC, group_size=64))
        for name in ("w13", "w2"):
            weight = getattr(rank, name)
            some = {f: getattr(weight, f)[places or [0]] for f in ("qweight", "scales")}
            setattr(rank, name, replace(weight, **some))
        rank.call = replace(rank.call, count=max(1, len(places)))
        known = {number: whole.weights[number] for number in places}
        expert_map = torch.tensor(here, dtype=torch.int32)
        y = check(rank, x, weights, ids.long(), known, expert_map)
        assert places or not y.any()
        total += y.double()
    testing.assert_close(total, reference.experts(x, weights, ids, whole.weights), 5e-3, 1e-3)


def test_all_tokens_at_one_expert_and_ids_without_one():
    layer = gpu_layer()
    x, weights, _ = routing(20, top_k=2)
    ids = torch.tensor([[3, -1], [3, COUNT]]).repeat(10, 1)
    check(layer, x.half(), weights, ids)


def test_no_tokens():
    layer = gpu_layer()
    x, weights, ids = routing(3)
    y = run(layer, x[:0].half(), weights[:0], ids[:0])
    assert (y.shape, y.dtype) == ((0, HIDDEN), HALF)


def test_tokens_with_strides_of_any_kind():
    layer = gpu_layer()
    x, weights, ids = routing(5)
    wide = torch.full((5, HIDDEN + 3), torch.nan).half()
    wide[:, 3:] = x
    odd = torch.cat([torch.zeros(1), x.flatten()]).half()[1:].view(5, HIDDEN)
    expected = run(layer, x.half(), weights, ids)
    for other in (wide[:, 3:], odd, x.half().t().contiguous().t()):
        columns = (weights.t().contiguous().t(), ids.t().contiguous().t())
        assert torch.equal(run(layer, other, *columns), expected)


def test_many_tokens_pass_in_parts(monkeypatch):
    layer = gpu_layer()
    x, weights, ids = routing(11)
    expected = run(layer, x.half(), weights, ids)
    monkeypatch.setattr(launches, "pass_tokens", lambda count, top_k: 4)
    experts.prepared_experts.cache_clear()
    seen = []
    chosen = choice.select

    def select(call, load, device):
        seen.append(load.tokens)
        return chosen(call, replace(load, tokens=11), device)

    monkeypatch.setattr(launches, "select", select)
    assert torch.equal(run(layer, x.half(), weights, ids), expected)
    assert seen == [4, 3]
    experts.prepared_experts.cache_clear()


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("hidden_blocks", [1, 9])
def test_batch_invariant_tokens_have_the_same_bits_in_any_batch(monkeypatch, hidden_blocks):
    """With nine K blocks, up is cut, by splits for few tokens and by segments for many."""
    hidden = 128 * hidden_blocks - 64
    layer = gpu_layer(
        replace(SPEC, group_size=64), policy=Policy(batch_invariant=True), hidden=hidden
    )
    x, weights, ids = routing(70, hidden=hidden)
    x = x.half()
    many = run(layer, x, weights, ids)
    h200 = device_by_name("sm_90")
    launch = choice.select(layer.call, choice.Load(70, 2, COUNT), h200)
    assert (launch.up.segments > 1) == (hidden_blocks > 1)
    for part in (slice(0, 1), slice(5, 6), slice(3, 9)):
        assert torch.equal(run(layer, x[part], weights[part], ids[part]), many[part])


def test_orders_of_features():
    """Each expert reads tokens, and what lies between its products, in orders of its own."""
    layer = gpu_layer(phase=0)
    generator = torch.Generator().manual_seed(5)
    orders = [
        (torch.randperm(HIDDEN, generator=generator), torch.randperm(INNER, generator=generator))
        for _ in range(COUNT)
    ]

    def ordered(weight: LogicalWeight, perm: torch.Tensor) -> LogicalWeight:
        return replace(weight, perm=perm.int())

    layer.weights = {
        number: reference.Expert(
            ordered(e.gate, outer), ordered(e.up, outer), ordered(e.down, back)
        )
        for (number, e), (outer, back) in zip(layer.weights.items(), orders, strict=True)
    }
    x, weights, ids = routing(6)
    perms = [torch.stack(each).int().to(DEVICE) for each in zip(*orders, strict=True)]
    layer.w13, layer.w2 = replace(layer.w13, perm=perms[0]), replace(layer.w2, perm=perms[1])
    check(layer, x.half(), weights, ids)
    check(layer, x[:1].half(), weights[:1], ids[:1])


def test_biases_of_both_products():
    layer = gpu_layer()
    layer.w13.qweight.fill_(-0x77777778)  # every code is 8, which is worth zero
    gate, up = torch.full((INNER,), 2.0), torch.linspace(-1, 1, INNER)
    bias = stacked.alternate(gate, up).half().expand(COUNT, -1).contiguous()
    back = torch.linspace(-2, 2, COUNT * HIDDEN).half().view(COUNT, HIDDEN)
    x, weights, ids = routing(3)
    stacks = Stack.of(layer.w13, bias.to(DEVICE)), Stack.of(layer.w2, back.to(DEVICE))
    operands = [each.to(DEVICE) for each in (x.half(), weights, ids)]
    y = experts.experts(*operands, None, *stacks, layer.call).cpu()
    hidden = (2 / (1 + torch.exp(torch.tensor(-2.0))) * up).half()
    expected = torch.zeros((3, HIDDEN), dtype=torch.float64)
    for token in range(3):
        for choice_, number in enumerate(ids[token].tolist()):
            product = reference.matmul(hidden[None], layer.weights[number].down, back[number])[0]
            expected[token] += weights[token, choice_].double() * product
    testing.assert_close(y, expected, 5e-3, 1e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
def test_a_graph_replays_for_any_routing():
    layer = gpu_layer()
    operands = [each.to(DEVICE) for each in routing(9)]
    operands[0] = operands[0].half()
    layer(*operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*operands)
    for seed in range(5):
        for held, other in zip(operands, routing(9, seed=seed), strict=True):
            held.copy_(other)
        graph.replay()
        assert torch.equal(y, layer(*operands))
