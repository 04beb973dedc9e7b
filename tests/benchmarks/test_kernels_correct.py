"""`kernels_correct.py`: it passes on the kernels as they are, and sees one that is wrong."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kernels_correct
from fusedq_kernels import guard, ops
from fusedq_kernels.types import Launch, QuantSpec, TileConfig, WeightType
from gemmbench import exactness
from gemmbench.results import ResultFile

CPU = torch.device("cpu")


def subject(phase: int = 0) -> exactness.Subject:
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    return exactness.Subject(exactness.Case(72, 272, spec, torch.float16, phase), CPU)


def test_a_dry_run_passes_writes_what_it_found_and_does_not_repeat_it(tmp_path: Path) -> None:
    arguments = ["--dry-run", "--weight-type", "uint4", "--shard", "0/4", "--out", str(tmp_path)]
    done = CliRunner().invoke(kernels_correct.app, arguments)
    assert done.exit_code == 0, done.output
    rows = ResultFile(tmp_path / "correct.csv", kernels_correct.COLUMNS).rows()
    # Every fourth of five cases: groups of 128 in bf16, and the shard that begins inside a group.
    assert {row["case"] for row in rows} == {
        "uint4 g128 bfloat16 72x272",
        "uint4 g128 bfloat16 72x272 phase 80",
    }
    assert {row["check"] for row in rows} == set(kernels_correct.CHECKS)
    assert {row["passed"] for row in rows} == {"yes"}
    again = CliRunner().invoke(kernels_correct.app, arguments)
    assert "0 checks, 0 failed" in again.output


def test_shards_of_the_cases_are_all_of_them() -> None:
    cases = list(exactness.cases([(72, 272)], small=True))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {case.spec.weight_type for case in cases} == set(WeightType)
    assert {case.phase for case in cases} == {0, 80}


def test_a_slightly_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.run
    monkeypatch.setattr(ops, "run", lambda *a: real(*a) * 1.001)
    with pytest.raises(AssertionError, match=r"M=3 Launch.*, no bias: .* RMS error 9\.\d\de-04, b"):
        exactness.check_right(subject(), 3, every_tile=False)


def test_an_output_that_is_never_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.run

    def forgetful(*arguments: object) -> torch.Tensor:
        y = real(*arguments)
        y[-1, -1] = torch.nan
        return y

    monkeypatch.setattr(ops, "run", forgetful)
    with pytest.raises(AssertionError, match="RMS error nan"):
        exactness.check_right(subject(), 3, every_tile=False)


@pytest.mark.parametrize("at", [(0, 0), (2, 71), (2, 0)])
def test_one_output_that_is_wrong_with_a_bias_alone_is_seen(
    monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]
) -> None:
    real = ops.run

    def run(x, packed, bias, launch):
        y = real(x, packed, bias, launch)
        if bias is not None:
            # The smallest step that no rounding of the output explains
            y[at] += 4 * torch.finfo(y.dtype).eps * max(1, y[at].abs().item())
        return y

    monkeypatch.setattr(ops, "run", run)
    with pytest.raises(AssertionError, match=r"M=3 .*, a bias: 1 of 216 outputs wrong"):
        exactness.check_right(subject(), 3, every_tile=False)


@pytest.mark.parametrize("tile", [TileConfig(64, 128, 1, 4, 2, scale_weights=True), None])
def test_the_bound_follows_from_the_number_of_outputs(tile: TileConfig | None) -> None:
    """Of 25 million right outputs none is taken for wrong, and one that is wrong is seen."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((25_600, 64), generator=generator)
    # Per-channel scales: rows of norms that differ
    weight *= torch.rand((25_600, 1), generator=generator) + 0.5
    x = torch.randn((1000, 64), generator=generator).bfloat16()
    truths = [
        guard.Truth.of_tokens(part, weight[:, 0].bfloat16(), [weight.double()])
        for part in x.split(exactness._TOKENS)
    ]
    y = (x.float() @ weight.bfloat16().float().t()).bfloat16()
    launch = Launch("triton-gemm", tile, "test")
    assert 1e-3 < exactness._check_outputs(y, False, launch, truths) < 3e-3
    y[999, 25_599] += 0.08 * weight[25_599].norm() + 0.01 * y[999, 25_599].abs()
    with pytest.raises(AssertionError, match="1 of 25600000 outputs wrong"):
        exactness._check_outputs(y, False, launch, truths)


def test_bits_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ops.run, []

    def wavering(*arguments: object) -> torch.Tensor:
        calls.append(1)
        y = real(*arguments)
        if len(calls) == 3:
            y[0, 0] += 1
        return y

    monkeypatch.setattr(ops, "run", wavering)
    with pytest.raises(AssertionError, match="M=2: run 1 differs"):
        exactness.check_repeatable(subject(), 2, runs=3)
    monkeypatch.setattr(ops, "run", lambda x, *rest: real(x, *rest) + (1 if x.shape[0] == 1 else 0))
    with pytest.raises(AssertionError, match=r"M=1 at 0, Launch.*: 72 outputs differ"):
        exactness.check_batch_invariant(subject(), [1, 2])


def test_every_tile_of_the_rules_is_launched() -> None:
    launches = list(subject().launches(17))
    tiles = {(launch.tile.block_m, launch.tile.block_n) for launch in launches}
    assert len(launches) == len({launch.tile for launch in launches}) > 4
    assert {(8, 128), (16, 64), (32, 128)} <= tiles


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on() -> None:
    done = CliRunner().invoke(kernels_correct.app, [])
    assert done.exit_code == 2
    assert "no CUDA device here; --dry-run" in " ".join(done.output.replace("│", " ").split())
