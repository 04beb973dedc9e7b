"""cpu-fused's experts in one call: against float64, and bit for bit against a call for each."""

from dataclasses import replace

import pytest
import torch

from expert_layers import COUNT, HIDDEN, INNER, Layer, routing
from fusedq_kernels import experts, reference, testing
from fusedq_kernels.activation import ACTIVATIONS, SILU, Activation
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.cpu import experts as one_by_one
from fusedq_kernels.experts import Stack
from fusedq_kernels.types import QuantSpec, WeightType

SPEC = QuantSpec(WeightType.UINT4B8, 32, torch.float16)
RELU2 = Activation("relu2_no_mul")
DTYPES = {torch.float16: (8e-3, 2e-3), torch.bfloat16: (6e-2, 1.5e-2)}


def made(spec: QuantSpec = SPEC, dtype: torch.dtype = torch.float16, **options) -> Layer:
    return Layer(spec, dtype, kernel="cpu-fused", **options)


def biased(layer: Layer, dtype: torch.dtype) -> tuple[Stack, Stack]:
    generator = torch.Generator().manual_seed(2)
    biases = (
        torch.randn((COUNT, of.n), generator=generator).to(dtype)
        for of in (layer.call.up, layer.call.down)
    )
    return tuple(map(Stack.of, (layer.w13, layer.w2), biases))


def ordered(layer: Layer) -> Layer:
    """Each expert reads features in an order of its own."""
    generator = torch.Generator().manual_seed(3)
    for name in ("w13", "w2"):
        weight = getattr(layer, name)
        orders = [torch.randperm(weight.k, generator=generator).int() for _ in range(COUNT)]
        setattr(layer, name, replace(weight, perm=torch.stack(orders)))
    return layer


def each_alone(layer: Layer, stacks: tuple[Stack, Stack], x, weights, ids, places=None):
    """The same by a product, an activation and a sum at a time, in PyTorch."""
    run = one_by_one.prepare(layer.call, lambda call: KERNELS[call.kernel].prepare(call, None))
    out = torch.empty_like(x)
    run(x, weights, ids, places, *stacks, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda each: each.value)
def test_every_weight_type_is_near_the_oracle(weight_type: WeightType, dtype: torch.dtype) -> None:
    layer = made(QuantSpec(weight_type, 32, torch.float16), dtype)
    for m in (1, 5, 40):
        x, weights, ids = routing(m)
        x = x.to(dtype)
        expected = reference.experts(x, weights, ids, layer.weights)
        testing.assert_close(layer(x, weights, ids), expected, *DTYPES[dtype])


CURVES = [
    *(Activation(name, 1.5 if name == "swiglustep" else None) for name in ACTIVATIONS),
    Activation("silu", limit=0.7, alpha=1.702, beta=1.0),
    Activation("silu", limit=0.5),
    Activation("situ", limit=0.5, alpha=2.0),
]


@pytest.mark.parametrize("activation", CURVES, ids=str)
def test_every_activation_over_all_of_its_range(activation: Activation) -> None:
    """Products of w13 are given by its bias; w2 passes them on."""
    inner, dtype = INNER, torch.float16
    layer = made(activation=activation)
    layer.w13.qweight.zero_(), layer.w13.scales.zero_()
    stacks = Stack.of(layer.w13), Stack.of(layer.w2)
    exponents = torch.arange(inner) / 4 - 8
    values = torch.stack([2.0**exponents, -(2.0**exponents)])[:, :, None].expand(2, inner, 2)
    x, weights, _ = routing(2, top_k=1)
    ids = torch.tensor([[0], [1]])
    gate, up = values[..., 0], values[..., 1].flip(1) / 8
    if activation.is_gated:
        halves = (each.unflatten(1, (-1, 8)) for each in (gate, up))
        sums = torch.stack(list(halves), dim=2).flatten(1)
    else:
        sums = gate
    bias = torch.zeros(COUNT, sums.shape[1], dtype=dtype)
    bias[:2] = sums
    y = experts.experts(
        x.half(), weights, ids, None, stacks[0]._replace(bias=bias), stacks[1], layer.call
    )
    given = [each.to(dtype).double() for each in (gate, up)]
    hidden = reference.activate(activation, *given)
    down = [reference.dequantize(layer.weights[each].down).double() for each in range(2)]
    expected = [weights[row].double() * (hidden[row] @ down[row].T) for row in range(2)]
    # Rounded thrice: between the products, behind the second and behind the sum
    unit = 2.0**-11
    for row in range(2):
        size = hidden[row].abs() @ down[row].abs().T * weights[row].double()
        assert ((y[row].double() - expected[row]).abs() <= 3.1 * unit * size + 2.0**-24).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "biased", "ordered", "mapped", "strides"])
def test_the_bits_are_those_of_one_product_after_the_other(case: str, dtype: torch.dtype) -> None:
    """Where the activation is exact and router weights are powers of two."""
    layer = made(QuantSpec(WeightType.UINT4, 32, torch.float16), dtype, activation=RELU2, phase=0)
    layer = ordered(layer) if case == "ordered" else layer
    stacks = Stack.of(layer.w13), Stack.of(layer.w2)
    stacks = biased(layer, dtype) if case == "biased" else stacks
    places = None
    if case == "mapped":
        places = torch.tensor([3, -1, 0, 4, -1, 2, 1, -1])
    for m in (1, 2, 7, 65, 300):
        x, weights, ids = routing(m, top_k=3, count=COUNT if places is None else 8)
        weights = 2.0 ** weights.mul(4).floor()
        if case == "strides":
            ids, weights = ids.long().t().contiguous().t(), weights.t().contiguous().t()
        operands = (x.to(dtype), weights, ids, places)
        y = experts.experts(*operands, *stacks, layer.call)
        assert torch.equal(y, each_alone(layer, stacks, *operands)), m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_every_batch_and_with_any_threads(dtype) -> None:
    layer = made(dtype=dtype)
    x, weights, ids = routing(70, top_k=3)
    x = x.to(dtype)
    whole = layer(x, weights, ids)
    for part in (slice(0, 1), slice(3, 9), slice(20, 70)):
        assert torch.equal(layer(x[part], weights[part], ids[part]), whole[part])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(layer(x, weights, ids), whole)
            assert torch.equal(layer(x[:1], weights[:1], ids[:1]), whole[:1])
    finally:
        torch.set_num_threads(threads)


def test_ids_without_a_place_and_an_expert_chosen_twice() -> None:
    layer = made()
    x, weights, _ = routing(4, top_k=3)
    ids = torch.tensor([[0, 0, 4], [-1, 2, COUNT], [-9, -1, 99], [1, 2, -7]])
    expected = reference.experts(x.half(), weights, ids, layer.weights)
    found = layer(x.half(), weights, ids)
    testing.assert_close(found, expected, 8e-3, 2e-3)
    assert not found[2].any()
    assert torch.equal(layer(x.half(), weights, ids, torch.arange(COUNT)), found)
    nowhere = torch.full((COUNT,), -1, dtype=torch.int32)
    assert not layer(x.half(), weights, ids, nowhere).any()


def test_what_is_no_number_is_passed_on_to_its_token_alone() -> None:
    for activation in (SILU, Activation("situ", 0.5, 2.0), RELU2, Activation("silu", 0.7)):
        layer = made(activation=activation)
        x, weights, ids = routing(9)
        x[4, 3] = torch.nan
        found = layer(x.half(), weights, ids)
        assert found[4].isnan().all()
        assert found[:4].isfinite().all()
        assert found[5:].isfinite().all()


def test_weights_of_two_kinds() -> None:
    """w13 of 4 bits with zero points, w2 of 8 bits in other groups."""
    layer = made(QuantSpec(WeightType.UINT4, 32, torch.bfloat16), torch.bfloat16)
    wide = made(QuantSpec(WeightType.UINT8B128, 16, torch.float32), torch.bfloat16, phase=0)
    layer.w2 = wide.w2
    layer.call = replace(layer.call, down=wide.call.down)
    layer.weights = {
        number: expert._replace(down=wide.weights[number].down)
        for number, expert in layer.weights.items()
    }
    x, weights, ids = routing(6)
    expected = reference.experts(x.bfloat16(), weights, ids, layer.weights)
    testing.assert_close(layer(x.bfloat16(), weights, ids), expected, 6e-2, 1.5e-2)


def test_many_tokens_pass_in_parts() -> None:
    """What lies between the products of 60,000 tokens' 16 choices is more than is kept at once."""
    layer = made()
    x, weights, ids = routing(200, top_k=4)
    many = 60000
    again = torch.arange(many) % 200
    operands = (x.half()[again], weights[again].repeat(1, 4), ids[again].repeat(1, 4))
    found = layer(*operands)
    once = layer(x.half(), weights.repeat(1, 4), ids.repeat(1, 4))
    assert torch.equal(found, once[again])


def test_a_traced_graph_has_one_node_for_a_layer() -> None:
    layer, graphs = made(), []
    stacks = Stack.of(layer.w13), Stack.of(layer.w2)
    x, weights, ids = routing(3)

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(
        lambda x: torch.ops.fusedq.experts(
            x, weights, ids, None, *stacks[0], *stacks[1], layer.call.text
        ),
        fullgraph=True,
        backend=backend,
    )
    assert torch.equal(run(x.half()), layer(x.half(), weights, ids))
    assert [str(target) for target in graphs[0]] == ["fusedq.experts"]


def test_one_kernel_runs_both_weights() -> None:
    layer = made()
    mixed = replace(layer.call, down=replace(layer.call.down, kernel="cpu-striped"))
    with pytest.raises(ValueError, match="cpu-fused runs both w13 and w2, got cpu-striped for w2"):
        experts.prepared_experts(mixed.text).run  # noqa: B018


def test_the_width_between_the_products_is_a_ranks() -> None:
    layer = made()
    x, weights, ids = routing(5)
    assert layer.call.down.in_features == INNER
    assert layer(x.half(), weights, ids).shape == (5, HIDDEN)
