"""The guard passes every right launch, and says where and how a wrong one is wrong."""

import pytest
import torch

from fusedq_kernels import guard, ops, testing
from fusedq_kernels.catalogue import SLICED_CUBLAS, TRITON_GATHER, TRITON_GEMM
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    Launch,
    PackedWeight,
    QuantSpec,
    TileConfig,
    WeightType,
)
from fusedq_kernels.warmup import Reached

N, K = 160, 320
EXACT = TileConfig(16, 64, 1, 4, 2)
SCALED = TileConfig(64, 64, 1, 4, 2, scale_weights=True)
SPLIT = TileConfig(16, 128, 3, 4, 2)


def weight(weight_type: WeightType = WeightType.UINT4B8, group_size: int = 64) -> PackedWeight:
    spec = QuantSpec(weight_type, group_size, torch.float16)
    logical = testing.random_logical(N, K, spec)
    return packing.pack(logical, TILED_LAYOUTS[weight_type], torch.float16)


def reached(tile: TileConfig | None, tokens: int, has_bias: bool = True) -> Reached:
    kernel = "triton-gemm" if tile is not None else "sliced-cublas"
    return Reached(Launch(kernel, tile, "test"), tokens, has_bias)


def check(packed: PackedWeight, tile: TileConfig | None, tokens: int) -> guard.Difference | None:
    kernel = TRITON_GEMM if tile is not None else SLICED_CUBLAS
    truth = guard.Truth.of(packed, torch.float16)
    return guard.check(reached(tile, tokens), kernel, packed, truth)


@pytest.mark.parametrize("tile", [EXACT, SCALED, SPLIT, None], ids=str)
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda each: each.value)
def test_a_right_launch_passes(weight_type: WeightType, tile: TileConfig | None) -> None:
    assert check(weight(weight_type), tile, 70) is None


def test_the_bound_is_near_what_right_launches_need() -> None:
    """A tenth of it would refuse them."""
    packed = weight()
    truth = guard.Truth.of(packed, torch.float16)
    for tile in (EXACT, SCALED):
        y = ops.run(truth.x, packed, None, Launch("triton-gemm", tile, "test")).double()
        launch = reached(tile, guard.TOKENS).launch
        allowed = guard.tolerance(launch, truth, truth.sums, y.numel(), K)
        worst = ((y - truth.sums).abs() / allowed).max().item()
        assert 0.1 < worst < 1
    assert allowed.max() < 0.03 * truth.sums.abs().max()


def test_the_bound_grows_with_outputs_features_and_units() -> None:
    packed = weight()
    truth = guard.Truth.of(packed, torch.float16)
    few, many = (
        guard.tolerance(reached(SCALED, 1).launch, truth, truth.sums, each, K).mean()
        for each in (100, 25_000_000)
    )
    assert 1.05 < many / few < 1.5
    short, long = (
        guard.tolerance(reached(EXACT, 1).launch, truth, truth.sums, 100, each).mean()
        for each in (1024, 65536)
    )
    assert long > short
    coarse = guard.Truth.of(packed, torch.bfloat16)
    wide = guard.tolerance(reached(EXACT, 1).launch, coarse, coarse.sums, 100, K).mean()
    fine = guard.tolerance(reached(EXACT, 1).launch, truth, truth.sums, 100, K).mean()
    assert 6 < wide / fine < 9


def wrong_at(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """`change(out, call)` after each launch; `out` has the memory behind it."""
    real, calls = ops.run, []

    def run(x, packed, bias, launch, out=None):
        y = real(x, packed, bias, launch, out=out)
        calls.append(1)
        change(out, len(calls))
        return y

    monkeypatch.setattr(ops, "run", run)


@pytest.mark.parametrize("at", [(0, 0), (69, N - 1), (65, 3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 30.0])
def test_one_wrong_output_is_seen_wherever_it_is(monkeypatch, at, value) -> None:
    wrong_at(monkeypatch, lambda out, call: out.__setitem__(at, value))
    found = check(weight(), SCALED, 70)
    assert (found.wrong, found.unlike, found.behind) == (1, 0, 0)
    assert str(found).startswith(f"1 of {70 * N} outputs wrong (the worst: token {at[0]}, output ")
    assert f"output {at[1]}: {value:.6g}, expected " in str(found)


def test_another_token_of_the_batch_is_wrong(monkeypatch) -> None:
    """A launch that reads each tile's tokens from the tile before."""
    real = ops.run
    monkeypatch.setattr(
        ops, "run", lambda x, *rest, out: real(torch.cat([x[:64], x[:-64]]), *rest, out=out)
    )
    assert check(weight(), SCALED, 70).wrong > 5 * N


def test_bits_that_change_are_seen(monkeypatch) -> None:
    def change(out: torch.Tensor, call: int) -> None:
        if call == 2:
            out.view(torch.int16)[3, 5] ^= 1

    wrong_at(monkeypatch, change)
    found = check(weight(), EXACT, 9)
    assert (found.wrong, found.unlike, found.behind) == (0, 1, 0)
    assert str(found) == f"1 of {9 * N} outputs other ones in a second run"


def test_what_is_written_behind_the_tokens_is_seen(monkeypatch) -> None:
    def change(out: torch.Tensor, call: int) -> None:
        out.as_strided((10, N), (N, 1))[9, 7] = 0

    wrong_at(monkeypatch, change)
    found = check(weight(), EXACT, 9)
    assert (found.wrong, found.unlike, found.behind) == (0, 0, 2)
    assert str(found) == "2 values written behind the last token"


def test_one_wrong_weight_is_seen() -> None:
    """What the kernel reads is not what the truth was computed from."""
    packed = weight()
    truth = guard.Truth.of(packed, torch.float16)
    packed.qweight[1, 100, 3] ^= 8
    for tile in (EXACT, SPLIT):
        found = guard.check(reached(tile, 17), TRITON_GEMM, packed, truth)
        assert found.wrong >= 8
        assert "output 100: " in found.worst


def test_rows_of_norms_far_apart_are_judged_each_by_its_own() -> None:
    spec = QuantSpec(WeightType.UINT4B8, 64, torch.float16)
    logical = testing.random_logical(N, K, spec)
    logical.scales[7] *= 100
    logical.scales[9] *= 1e-3
    packed = packing.pack(logical, TILED_LAYOUTS[spec.weight_type], torch.float16)
    for tile in (EXACT, SCALED):
        assert check(packed, tile, 9) is None
    truth = guard.Truth.of(packed, torch.float16)
    packed.scales[:, 9] *= 2
    assert guard.check(reached(EXACT, 9), TRITON_GEMM, packed, truth).wrong >= 8


def test_an_output_too_large_for_its_dtype_is_not_judged() -> None:
    spec = QuantSpec(WeightType.UINT4B8, 64, torch.float32)
    logical = testing.random_logical(N, K, spec)
    logical.scales[7] *= 1e6
    packed = packing.pack(logical, TILED_LAYOUTS[spec.weight_type], torch.float16)
    assert check(packed, EXACT, 9) is None


def test_rows_of_an_embedding(monkeypatch) -> None:
    packed = weight()
    truth = guard.Truth.of(packed, torch.float16)
    lookup = Reached(Launch("triton-gather", None, "test"), 1)
    assert guard.check(lookup, TRITON_GATHER, packed, truth) is None
    spec = QuantSpec(WeightType.UINT4B8, 64, torch.float32)
    logical = testing.random_logical(N, K, spec)
    logical.scales[0] *= 1e9  # infinite in fp16, which zeros for an unknown id must not depend on
    wide = packing.pack(logical, TILED_LAYOUTS[spec.weight_type], torch.float16)
    assert guard.check(lookup, TRITON_GATHER, wide, guard.Truth.of(wide, torch.float16)) is None
    real = ops.embedding
    monkeypatch.setattr(ops, "embedding", lambda ids, *rest: real(ids.clamp(max=N - 2), *rest))
    found = guard.check(lookup, TRITON_GATHER, packed, truth)
    assert found.wrong > K
    assert f"id {N - 1}, column " in found.worst
