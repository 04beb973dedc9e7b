"""Tiles of experts: functions of shapes alone, in few launches, within what they may allocate."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedq_kernels.activation import SILU, Activation
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.choose import expert_memory, experts
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.experts import Load, pass_tokens, reachable, select
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import MAX_TILES, most_blocks
from fusedq_kernels.types import TILED_LAYOUTS, Policy, QuantSpec, WeightType

H200 = device_by_name("h200")
GPUS = sorted(KNOWN_DEVICES.values(), key=lambda each: each.name)


def call(
    hidden=2048,
    inner=768,
    count=128,
    group=128,
    phase=0,
    weight_type=WeightType.UINT4B8,
    invariant=False,
    activation=SILU,
) -> ExpertsCall:
    spec, policy = QuantSpec(weight_type, group, DType.BFLOAT16), Policy(batch_invariant=invariant)
    rows = inner * (2 if activation.is_gated else 1)
    sides = ((rows, hidden, 0, hidden), (hidden, inner, phase, inner))
    up, down = (
        Call("triton-gemm", TILED_LAYOUTS[weight_type], spec, *size, DType.BFLOAT16, policy)
        for size in sides
    )
    return ExpertsCall(count, activation, up, down)


@st.composite
def calls(draw: st.DrawFn, invariant: bool | None = None) -> tuple[ExpertsCall, int, int]:
    """A rank's experts, how many a token asks, and how many there are on all ranks."""
    top_k, ranks = draw(st.integers(1, 10)), draw(st.sampled_from([1, 2, 8]))
    count = draw(st.sampled_from([8, 48, 60, 128, 384]))
    group = draw(st.sampled_from([8, 32, 48, 64, 128, 1 << 16]))
    made = call(
        *(128 * draw(st.integers(1, 56)), 16 * draw(st.integers(1, 160)), count, group),
        phase=16 * draw(st.integers(0, 7)) % group if group >= 16 else 0,
        weight_type=draw(st.sampled_from(WeightType)),
        invariant=draw(st.booleans()) if invariant is None else invariant,
        activation=draw(st.sampled_from([SILU, Activation("relu2_no_mul")])),
    )
    return made, top_k, count * ranks


@pytest.mark.parametrize(
    ("tokens", "block_m"),
    [(1, 8), (32, 8), (64, 8), (65, 16), (128, 16), (256, 32), (512, 64), (1024, 128), (4096, 128)],
)
def test_a_block_holds_the_tokens_that_most_experts_get(tokens, block_m):
    """128 experts of which each token asks 8."""
    launch = select(call(), Load(tokens, 8, 128), H200)
    assert {launch.up.block_m, launch.down.block_m, launch.block_m} == {block_m}


def test_only_experts_full_of_tokens_get_the_widest_block():
    wide = call(4096, 14336, 8)
    assert select(wide, Load(1024, 2, 8), H200).block_m == 128
    assert select(wide, Load(2048, 2, 8), H200).block_m == 256


def test_expected_rows_and_experts():
    load = Load(1, 8, 128)
    assert (load.touched, load.rows) == (8 / 128, 1.0)
    assert Load(1000, 2, 8).rows == 250.0
    assert Load(3, 4, 4).touched == 1.0


def test_experts_of_other_ranks_change_no_block():
    for tokens in (1, 17, 64, 300):
        whole = select(call(count=128), Load(tokens, 8, 128), H200)
        assert select(call(count=16), Load(tokens, 8, 128), H200).block_m == whole.block_m


def test_few_programs_split_k():
    one = select(call(7168, 256, 384, 32), Load(1, 8, 384), H200)
    assert one.up.split_k > 1
    assert one.down.split_k == 1
    many = select(call(7168, 256, 384, 32), Load(64, 8, 384), H200)
    assert many.up.split_k == many.down.split_k == 1


@settings(max_examples=150, deadline=None)
@given(case=calls(), device=st.sampled_from(GPUS), tokens=st.integers(1, 20000))
def test_any_experts_get_tiles(case, device, tokens):
    made, top_k, all_experts = case
    launch = select(made, Load(tokens, top_k, all_experts), device)
    assert launch.up.block_m == launch.down.block_m
    # Tokens of an expert are no neighbours in memory.
    assert not launch.up.x_descriptor
    tokens = min(tokens, pass_tokens(made.count, top_k))
    for tile, side in ((launch.up, made.up), (launch.down, made.down)):
        padded = -(-side.n // 128) * 128
        assert padded % tile.block_n == 0
        assert min(tile.split_k, tile.segments) == 1
        blocks = most_blocks(tokens * top_k, made.count, tile.block_m)
        assert tile.split_k == 1 or blocks * padded // tile.block_n <= MAX_TILES


@settings(max_examples=80, deadline=None)
@given(case=calls(), device=st.sampled_from(GPUS), tokens=st.integers(1, 9000))
def test_every_launch_is_reachable_and_scratch_is_declared(case, device, tokens):
    made, top_k, all_experts = case
    tokens = min(tokens, pass_tokens(made.count, top_k))
    load = Load(tokens, top_k, all_experts)
    launch = select(made, load, device)
    known = {(one.up, one.down) for *_, one in reachable(made, top_k, all_experts, device, 9000)}
    assert (launch.up, launch.down) in known
    for ordered in ((False, False), (True, False), (True, True)):
        most = expert_memory.most_scratch(made, top_k, all_experts, device, 9000, ordered)
        assert expert_memory.scratch_bytes(made, launch, load, ordered) <= most


@settings(max_examples=80, deadline=None)
@given(case=calls(invariant=True), device=st.sampled_from(GPUS))
def test_in_a_batch_invariant_layer_k_is_cut_alike_for_any_tokens(case, device):
    made, top_k, all_experts = case
    cuts = set()
    for tokens in (1, 2, 5, 33, 64, 65, 300, 4000):
        launch = select(made, Load(tokens, top_k, all_experts), device)
        assert launch.block_m >= 16
        tiles = (launch.up, launch.down)
        assert not any(tile.scale_weights for tile in tiles)
        cuts.add(tuple(tile.split_k * tile.segments for tile in tiles))
    assert len(cuts) == 1


def test_segments_take_the_place_of_splits():
    made = call(7168, 2048, 48, 32, invariant=True)
    few, many = (select(made, Load(tokens, 8, 384), H200) for tokens in (64, 65))
    assert few.up.split_k == many.up.segments > 1
    assert few.up.segments == many.up.split_k == 1
    assert "batch-invariant" in many.source


@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 65, 500])
def test_reachable_launches_name_the_fewest_tokens(tokens):
    launches = reachable(call(), 8, 128, H200, 4096)
    fewest, most, launch = max(
        (entry for entry in launches if entry[0] <= tokens), key=lambda entry: entry[0]
    )
    chosen = select(call(), Load(tokens, 8, 128), H200)
    again = [one for *_, one in launches if (one.up, one.down) == (chosen.up, chosen.down)]
    assert again
    assert select(call(), Load(fewest, 8, 128), H200).block_m == launch.block_m
    # One token, 64 slots, 512 slots: other kernels sort them.
    assert {1, 9, 65} <= {each.tokens for each in launches}
    assert fewest <= most
    assert max(each.most for each in launches) == 4096


def test_few_launches_serve_any_number_of_tokens():
    assert len(reachable(call(), 8, 128, H200, 1 << 20)) <= 14


def test_scratch_counts_each_buffer():
    made = call(7168, 256, 384, 32)
    load = Load(1, 8, 384)
    launch = select(made, load, H200)
    assert (launch.block_m, launch.up.split_k) == (8, 8)
    blocks = (8 + 8 * 7) // 8
    tables, inner = 4 * (8 * blocks + blocks), 2 * 8 * blocks * 256
    sums, back = 4 * 8 * 8 * 512, 2 * 8 * 7168
    assert expert_memory.scratch_bytes(made, launch, load) == tables + inner + max(sums, back)
    ordered = expert_memory.scratch_bytes(made, launch, load, (True, False))
    assert ordered == tables + inner + max(2 * 8 * blocks * 7168 + sums, back)
    many = Load(200, 8, 384)
    unsplit = replace(launch, up=replace(launch.up, split_k=1))
    blocks = (1600 + 384 * 7) // 8
    counts = 4 * 4 * 512  # four chunks of 512 slots, 384 experts and those of none
    expected = 4 * 9 * blocks + counts + 2 * 8 * blocks * 256 + 2 * 1600 * 7168
    assert expert_memory.scratch_bytes(made, unsplit, many) == expected


@pytest.mark.parametrize(("count", "places"), [(1, 32), (31, 32), (32, 64), (128, 256)])
def test_a_histogram_has_a_place_for_slots_without_an_expert(count, places):
    assert expert_memory.bins(count) == places


@given(tokens=st.integers(1, 1 << 20))
def test_a_rung_is_near(tokens):
    rung = experts._rung(tokens)
    assert tokens <= rung < 1.5 * tokens + 1
    assert experts._rung(rung) == rung
