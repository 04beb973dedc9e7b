"""`bench_experts.py --dry-run` as a user runs it, and the arithmetic of its floors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bench_experts
from fusedq_kernels.types import QuantSpec, WeightType
from gemmbench.contender import Unavailable
from gemmbench.expert_layers import RandomExperts, expert_bytes, floor_seconds, rows_of
from gemmbench.expert_shapes import MODELS, ExpertsShape
from gemmbench.results import ResultFile
from gemmbench.vllm_experts import MarlinExperts, TritonExperts, _bytes

SCRIPT = Path(bench_experts.__file__)
ARGUMENTS = ("--dry-run", "--m", "1", "--m", "3", "--routing", "uniform")
KERNELS = ("fusedq", "fusedq-sort", "fusedq-up", "fusedq-down", "fusedq-sum")
CPU = torch.device("cpu")
SPEC = QuantSpec(WeightType.UINT4B8, 64, torch.bfloat16)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A complete dry run: its folder and output."""
    out = tmp_path_factory.mktemp("results")
    contenders = (argument for name in KERNELS for argument in ("--contender", name))
    command = [sys.executable, str(SCRIPT), *ARGUMENTS, *contenders, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def plain(output: str) -> str:
    """Without the frame that typer draws and its line breaks."""
    return " ".join(output.replace("│", " ").split())


def test_every_part_is_timed_and_the_whole_is_right(finished_run: tuple[Path, str]) -> None:
    rows = ResultFile(finished_run[0] / "experts.csv").rows()
    assert {(row["kernel"], row["m"]) for row in rows} == {(k, m) for k in KERNELS for m in "13"}
    for row in rows:
        assert float(row["us"]) > 0
        assert float(row["floor_us"]) > 0
        assert 2 <= float(row["touched"]) <= 6
    whole = [row for row in rows if row["kernel"] == "fusedq"]
    assert all(0 < float(row["rms_error"]) < 1e-2 for row in whole)
    assert all(row["detail"].startswith("rule: ") for row in whole)
    assert all(row["rms_error"] == "" for row in rows if row not in whole)


def test_a_second_run_measures_nothing_again(finished_run: tuple[Path, str]) -> None:
    before = (finished_run[0] / "experts.csv").read_text()
    arguments = (*ARGUMENTS, "--contender", "fusedq", "--out", str(finished_run[0]))
    done = CliRunner().invoke(bench_experts.app, arguments)
    assert done.exit_code == 0, done.output
    assert (finished_run[0] / "experts.csv").read_text() == before


def test_a_rank_of_experts_leaves_out_the_others(tmp_path: Path) -> None:
    arguments = ("--dry-run", "--m", "3", "--ep", "2", "--routing", "zipf")
    whole = ("--contender", "fusedq", "--out", str(tmp_path))
    done = CliRunner().invoke(bench_experts.app, (*arguments, *whole))
    assert done.exit_code == 0, done.output
    (row,) = ResultFile(tmp_path / "experts.csv").rows()
    assert (row["experts"], row["ep"]) == ("3", "2")
    assert float(row["rms_error"]) < 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_times_need_a_gpu() -> None:
    done = CliRunner().invoke(bench_experts.app, ())
    assert done.exit_code == 2
    assert "no CUDA device here; --dry-run exercises everything" in plain(done.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt"), "unknown ['gpt']; known: mixtral-8x7b"),
        (("--routing", "even"), "unknown ['even']; known: uniform, zipf"),
        (("--contender", "x"), "unknown ['x']; known: fusedq, fusedq-invariant"),
        (("--ep", "4"), "6 experts are not divisible by 4 ranks"),
        (("--tp", "3"), "128 inner are not divisible by 3 ranks"),
    ],
)
def test_what_is_not_there_is_refused(arguments, message) -> None:
    done = CliRunner().invoke(bench_experts.app, ("--dry-run", *arguments))
    assert done.exit_code == 2
    assert message in plain(done.output)


def test_a_contender_that_computes_something_else_has_no_time() -> None:
    layer = RandomExperts(MODELS["dry-run"].on_rank(1, 1), SPEC, CPU)
    wrong = bench_experts.PreparedExperts(lambda x, w, i: torch.zeros_like(x), lambda m: "zeros")
    row = bench_experts._timed(wrong, layer, torch.bfloat16, 2, "uniform", 2)
    assert row["detail"] == "wrong: RMS error 1.00e+00"
    assert "us" not in row

    def fails(x, w, i):
        raise RuntimeError("no such\n kernel")

    failing = bench_experts.PreparedExperts(fails, lambda m: "")
    row = bench_experts._timed(failing, layer, torch.bfloat16, 2, "uniform", 2)
    assert row == {"detail": "failed: no such kernel"}


def test_popular_experts_are_asked_more_often() -> None:
    layer = RandomExperts(ExpertsShape(64, 64, 32, 4, 64, 32), SPEC, CPU)
    counts = {}
    for routing in ("uniform", "zipf"):
        draw = layer.draw(2000, routing, seed=0)
        assert all(len(set(ids)) == 4 for ids in draw.ids.tolist())
        assert (draw.touched, draw.slots) == (32, 8000)
        assert torch.allclose(draw.weights.sum(1), torch.ones(2000))
        counts[routing] = draw.ids.flatten().bincount(minlength=32)
    assert counts["uniform"].max() < 1.3 * counts["uniform"].min()
    assert counts["zipf"].max() > 6 * counts["zipf"].min()
    assert layer.draw(5, "zipf", 1).ids.tolist() != layer.draw(5, "zipf", 2).ids.tolist()


def test_the_floor_counts_the_experts_that_were_drawn() -> None:
    shape = MODELS["qwen3-30b-a3b"].on_rank(1, 1)
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
    bits = 8 * expert_bytes(spec, shape) / (3 * 2048 * 768)
    assert bits == 4 + 16 / 128
    zeros = QuantSpec(WeightType.UINT4, 128, torch.bfloat16)
    assert 8 * expert_bytes(zeros, shape) / (3 * 2048 * 768) == 4 + 20 / 128
    draw = RandomExperts(shape, spec, CPU).draw(1, "uniform", 0)
    assert (draw.touched, draw.slots) == (8, 8)
    moved = 8 * expert_bytes(spec, shape) + 4 * 2048
    assert floor_seconds(draw, shape, spec, 1e12, 1e18) == moved / 1e12
    flops = 6 * 8 * 2048 * 768
    assert floor_seconds(draw, shape, spec, 1e18, 1e12) == flops / 1e12


def test_peers_get_the_same_codes() -> None:
    layer = RandomExperts(MODELS["dry-run"].on_rank(1, 1), SPEC, CPU)
    gate, up, _ = layer.expert(1)
    codes = rows_of(gate, up, "codes")
    assert torch.equal(codes[:128], gate.codes)
    assert torch.equal(codes[128:], up.codes)
    packed = _bytes(codes)
    assert packed.shape == (256, 128)
    assert torch.equal(packed & 15, codes[:, 0::2])
    assert torch.equal(packed >> 4, codes[:, 1::2])
    assert torch.equal(layer.expert(1).gate.codes, gate.codes)
    for contender in (MarlinExperts(), TritonExperts()):
        with pytest.raises(Unavailable, match="need a CUDA device"):
            contender.prepare(layer, torch.bfloat16)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "kimi-k2", "glm-4.5-air"])
def test_ranks_hold_parts(name: str) -> None:
    whole = MODELS[name]
    cut = whole.on_rank(2, 2)
    assert (cut.inner, cut.count) == (whole.inner // 2, whole.count // 2)
    assert (cut.all_experts, cut.top_k) == (whole.count, whole.top_k)
