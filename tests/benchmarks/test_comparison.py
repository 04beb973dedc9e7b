"""What a contender has to prove before it is timed, and what happens to those that cannot."""

from pathlib import Path

import pytest
import torch

from fusedq_kernels import reference
from fusedq_kernels.types import LogicalWeight, WeightType
from gemmbench import answers, comparison, shapes, weights
from gemmbench.contender import Prepared, Unavailable
from gemmbench.libraries import LIBRARIES
from gemmbench.own import OWN, Fused
from gemmbench.vllm_linear import pack_words
from vllm_fusedq.measure import timing
from vllm_fusedq.measure.random_weights import random_tokens, random_weight

CPU = torch.device("cpu")
# bitsandbytes runs on a CPU too, where it is installed.
ON_CPU = (*OWN, *(each for each in LIBRARIES if each.name == "bitsandbytes"))


class Wrong(Fused):
    """Off by a tenth, as with a scale of the wrong group."""

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        right = super().prepare(logical, act_dtype)
        return right._replace(run=lambda x: right.run(x) * 1.1)


class Breaking(Fused):
    """Takes the weight and fails at the first call."""

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        def run(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("too much shared memory")

        return super().prepare(logical, act_dtype)._replace(run=run)


class Uncapturable(Fused):
    """Cannot be captured into a CUDA graph, which torch says with its advice for any CUDA error."""

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        raise RuntimeError(
            "CUDA error: operation not permitted when stream is capturing\n"
            "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
        )


class Lost(Fused):
    """Breaks the CUDA context."""

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def compare(contenders: list, tmp_path: Path) -> comparison.Comparison:
    spec = weights.default_spec(WeightType.UINT4B8, None, 128, torch.float16)
    marker = comparison.CrashMarker(tmp_path / "running.json")
    return comparison.Comparison(contenders, 128, 128, spec, torch.float16, CPU, marker)


@pytest.mark.parametrize("contender", ON_CPU, ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("weight_type", "group_size"),
    [
        (WeightType.UINT4B8, 32),
        (WeightType.UINT4B8, -1),
        (WeightType.UINT4, None),
        (WeightType.UINT8, 64),
        (WeightType.UINT8B128, None),
        (WeightType.NF4, None),
        (WeightType.FP4, None),
    ],
    ids=lambda value: getattr(value, "value", value),
)
def test_contenders_multiply_by_the_weight_they_were_given(
    contender: comparison.Contender, weight_type: WeightType, group_size: int | None
) -> None:
    spec = weights.default_spec(weight_type, group_size, 256, torch.float16)
    logical = random_weight(64, 256, spec, CPU)
    x = random_tokens(3, 256, torch.float16, CPU)
    try:
        contender.version()
        prepared = contender.prepare(logical, torch.float16)
    except Unavailable as reason:
        pytest.skip(str(reason))
    errors = answers.Answer(x, logical).errors(prepared.run(x))
    assert errors.rms < 1e-3
    assert not errors.wrong
    assert prepared.dram_bytes(3) >= prepared.weight_bytes


def test_a_wrong_answer_is_not_timed(tmp_path: Path) -> None:
    rows = compare([Wrong("off")], tmp_path).measure(2)
    (row,) = [row for row in rows if row["kernel"] == "off"]
    assert row["us"] == ""
    assert row["detail"].startswith("WRONG, not timed: RMS error 1.0")


def test_a_failure_costs_its_own_row_alone(tmp_path: Path) -> None:
    rows = {row["kernel"]: row for row in compare([Breaking("bad"), Fused()], tmp_path).measure(2)}
    assert rows["bad"]["us"] == ""
    assert rows["bad"]["detail"] == "FAILED: RuntimeError: too much shared memory"
    assert rows["fusedq"]["us"] > 0


def test_an_error_that_leaves_the_device_alive_costs_one_contender(tmp_path: Path) -> None:
    found = compare([Uncapturable("graphless"), Fused()], tmp_path)
    assert "not permitted when stream is capturing" in found.refused["graphless"]
    assert next(row["kernel"] for row in found.measure(1) if row["us"]) == "fusedq"


def test_a_lost_device_ends_the_run_and_leaves_its_culprit_behind(tmp_path: Path) -> None:
    with pytest.raises(comparison.DeviceLost, match="lost: CUDA error: an illegal memory access"):
        compare([Lost("lost")], tmp_path)
    marker = comparison.CrashMarker(tmp_path / "running.json")
    assert marker.culprit() == "lost"
    marker.clear()
    assert marker.culprit() is None


def test_a_finished_measurement_leaves_no_culprit(tmp_path: Path) -> None:
    compare([Fused()], tmp_path).measure(1)
    assert comparison.CrashMarker(tmp_path / "running.json").culprit() is None


def test_words_hold_codes_from_the_low_bits_up() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    assert pack_words(codes, 4).item() == 0xF7654321 - (1 << 32)
    assert pack_words(codes, 8).tolist() == [[0x04030201, 0x0F070605]]


@pytest.mark.parametrize("at", [(0, 0), (1023, 24_575), (700, 11_111)])
def test_one_wrong_output_of_25_million_is_seen(at: tuple[int, int]) -> None:
    spec = weights.default_spec(WeightType.UINT4B8, None, 128, torch.bfloat16)
    logical = random_weight(24_576, 128, spec, CPU)
    x = random_tokens(1024, 128, torch.bfloat16, CPU)
    answer = answers.Answer(x, logical)
    weight = reference.dequantize(logical, torch.bfloat16).bfloat16()
    y = (x.float() @ weight.float().t()).bfloat16()
    errors = answer.errors(y)
    assert errors.verdict == ""
    assert 1e-3 < errors.rms < 3e-3
    row = weight[at[1]].float().norm().item()
    for value in (y[at].item() + 0.15 * row, torch.nan):
        y[at] = value
        assert answer.errors(y).wrong == 1
        assert answer.errors(y).verdict


def test_a_bias_is_part_of_the_answer() -> None:
    spec = weights.default_spec(WeightType.UINT4B8, None, 128, torch.float16)
    logical = random_weight(64, 128, spec, CPU)
    x, bias = random_tokens(3, 128, torch.float16, CPU), torch.full((64,), 9.0).half()
    answer = answers.Answer(x, logical)
    y = Fused().prepare(logical, torch.float16).with_bias(x, bias)
    assert answer.errors(y, bias).verdict == ""
    assert answer.errors(y).verdict.startswith("RMS error ")


def test_what_is_wrong_with_a_bias_alone_is_not_timed(tmp_path: Path) -> None:
    class Forgetful(Fused):
        def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
            right = super().prepare(logical, act_dtype)
            return right._replace(with_bias=lambda x, bias: right.run(x))

    rows = compare([Forgetful("forgetful")], tmp_path).measure(2)
    (row,) = [row for row in rows if row["kernel"] == "forgetful"]
    assert row["us"] == ""
    assert row["detail"].startswith("WRONG, not timed: with a bias, RMS error ")


def test_median_and_spread_of_times() -> None:
    assert timing.summary([4.0, 1.0, 2.0, 3.0, 100.0]) == timing.Timing(3.0, 2.0, 5, 1.0)
    assert timing.summary([4.0]) == timing.Timing(4.0, 0.0, 1, 4.0)


def test_layers_of_models_are_the_published_ones() -> None:
    assert shapes.MODELS["llama-3-8b"].linears() == {
        "qkv_proj": (6144, 4096),
        "o_proj": (4096, 4096),
        "gate_up_proj": (28672, 4096),
        "down_proj": (4096, 14336),
    }
    # Four key/value heads on eight ranks: each rank keeps one whole head.
    assert shapes.MODELS["qwen2.5-7b"].linears(4)["qkv_proj"] == ((7 + 2) * 128, 3584)
    assert shapes.MODELS["llama-3-70b"].linears(8)["down_proj"] == (8192, 3584)
    same = shapes.named_shapes(["llama-3-8b", "mistral-7b", "tiny-gemm"], [1])
    assert same[4096, 4096] == [
        "llama-3-8b/tp1/o_proj",
        "mistral-7b/tp1/o_proj",
        "tiny-gemm/q_proj",
    ]
