"""`fusedq bench`: what is timed is the layer's product, and what is said follows from the times."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import pytest
import torch
from typer.testing import CliRunner, Result

from fusedq_kernels import reference
from fusedq_kernels.catalogue import Op
from fusedq_kernels.cpu import fused as cpu_fused
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.native.build import BuildError
from published import MODELS, write_headers
from tiny_models import MIXTURE, asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.cli import app
from vllm_fusedq.errors import EngineError
from vllm_fusedq.measure import contenders, expert_contenders, extras, serving, timing, undecoded
from vllm_fusedq.measure.bench import Bench, Row, bench
from vllm_fusedq.measure.bench_report import serving_table, summary
from vllm_fusedq.measure.contenders import (
    DENSE,
    FUSED,
    READ,
    Contender,
    cold,
    copies,
    fused,
    packed_for,
)
from vllm_fusedq.measure.timing import Timing, by_turns
from vllm_fusedq.measure.undecoded import ALONE, UNDECODED
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.report.table import render
from vllm_fusedq.settings import this_cpu

CPU = torch.device("cpu")
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "bench.v1.json"


@pytest.fixture(autouse=True)
def small_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(contenders, "MAX_COPIES", 3)


def plans(name: str) -> tuple[LayerPlan, ...]:
    target = Target(this_cpu(), torch.bfloat16)
    return plan_model(read_checkpoint(asset(name)), target).layers


def fusedq(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def document(*arguments: str) -> dict[str, Any]:
    result = fusedq(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    return found


@pytest.mark.parametrize("name", ["tiny-llama-awq-g128", "tiny-llama-gptq-mixed"])
def test_what_is_timed_is_the_product(name: str) -> None:
    """Of every kind of weight of these, also reordered ones."""
    ordered = set()
    for plan in plans(name)[:4]:
        call = plan.use(Op.MATMUL).call
        packed = packed_for(call, CPU, plan.ordered)
        contender = fused(call, cold(packed))
        x, out = torch.randn(5, call.in_features).bfloat16(), torch.empty(5, plan.n).bfloat16()
        expected = reference.matmul(x, unpack(packed))
        for run in contender.runs:
            run(x, out.fill_(torch.nan))
            assert (out - expected).abs().max() <= 0.02 * expected.abs().max()
        assert contender.bytes == sum(size for _, size in plan.resident)
        ordered.add(plan.ordered)
    assert ordered == ({False, True} if "mixed" in name else {False})


def test_rows_of_every_distinct_layer() -> None:
    told = []
    found = bench(
        plans("tiny-llama-awq-g128"), (3,), CPU, "a CPU", lambda *now: told.append(now), rounds=3
    )
    assert [(row.n, row.k, row.count, row.m) for row in found.rows] == [
        (256, 256, 2, 3),
        (512, 256, 2, 3),
        (512, 256, 2, 3),
        (256, 256, 2, 3),
    ]
    assert len({row.layers for row in found.rows}) == 4
    assert {row.kernel for row in found.rows} == {"cpu-fused"}
    # Equal layers are timed once
    assert found.rows[0].fused is found.rows[3].fused
    assert {row.decoding for row in found.rows} == {None}
    assert told[-1] == (4, 4)
    (step,) = found.steps
    assert step.weight_bytes == sum(
        size for plan in plans("tiny-llama-awq-g128") for _, size in plan.resident
    )


def row(
    m: int, us: float, count: int = 1, dense_us: float = 8.0, decoding: float | None = None
) -> Row:
    times = Timing(us, 0.0, 3, us), Timing(dense_us, 0.0, 3, dense_us)
    return Row("a.b", count, "awq", "cpu-fused", 64, 32, m, 2000, *times, 4.0, decoding)


def test_numbers_follow_from_times() -> None:
    one = row(1, us=2.0)
    assert (one.gbs, one.percent_read, one.speedup) == (1.0, 25.0, 4.0)
    found = Bench("a CPU", "bfloat16", (row(1, 2.0, 3), row(4, 5.0), row(1, 1.0)), ("experts",))
    assert [(s.m, s.fused_us, s.dense_us, s.weight_bytes) for s in found.steps] == [
        (1, 7.0, 32.0, 8000),
        (4, 5.0, 8.0, 2000),
    ]
    assert [step.decoding for step in found.steps] == [None, None]
    assert "reads 4.0 to 4.0 GB/s" in summary(found)
    assert summary(found).endswith("not measured: experts")


def test_the_share_of_decoding_is_weighted_by_the_time_of_the_layers() -> None:
    rows = (row(1, 2.0, 3, decoding=0.5), row(1, 6.0, decoding=0.1), row(1, 90.0))
    (step,) = Bench("a CPU", "bfloat16", rows, ()).steps
    assert step.decoding == pytest.approx((0.5 * 6 + 0.1 * 6) / 12)


def test_decoding_is_what_the_kernel_is_shorter_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def by_turns(calls: dict[str, list], rounds: int, seconds: float) -> dict[str, Timing]:
        asked.append(set(calls))
        us = {READ: 1.0, DENSE: 8.0, FUSED: 5.0, ALONE: 4.0, UNDECODED: 3.0}
        return {name: Timing(us[name], 0.0, 3, us[name]) for name in calls}

    monkeypatch.setattr(contenders, "by_turns", by_turns)
    monkeypatch.setattr(undecoded, "load", cpu_fused.load)
    layers = (plans("tiny-llama-awq-g128")[0], *experts_of(MIXTURE))
    found = bench(layers, (1,), CPU, "a CPU", lambda *now: None, ablate=True)
    linear, experts = found.rows
    assert (linear.decoding, experts.decoding) == (0.25, None)
    three = {READ, DENSE, FUSED}
    assert asked == [three | {ALONE, UNDECODED}, three]


def experts_of(name: str) -> list[LayerPlan]:
    """w13 and w2 of the first layer with experts."""
    return [plan for plan in plans(name) if plan.experts is not None][:2]


def test_experts_are_timed_as_one_layer() -> None:
    pair = experts_of(MIXTURE)
    found = bench(pair, (1, 64), CPU, "a CPU", lambda *now: None, rounds=3)
    assert [row.m for row in found.rows] == [1, 64]
    assert all("experts.w13" in row.layers for row in found.rows)
    # Two of four experts are asked by a token, all of them by many
    whole = sum(size for plan in pair for _, size in plan.resident)
    assert [row.weight_bytes for row in found.rows] == [whole // 2, whole]
    assert found.skipped == ()


def test_experts_of_an_unknown_number_for_a_token_are_not_timed() -> None:
    up, down = experts_of(MIXTURE)
    up = replace(up, shard=replace(up.shard, top_k=0))
    found = bench((up, down, *plans(MIXTURE)[:1]), (1,), CPU, "a CPU", lambda *now: None, rounds=3)
    assert len(found.skipped) == 1
    assert "experts.w13" in found.skipped[0]


def test_what_is_timed_of_experts_is_their_sum() -> None:
    up, down = experts_of(MIXTURE)
    stacks = expert_contenders.stacked_pair(up, down, CPU)
    routing = expert_contenders.Routing.uniform(5, 2, up.shard.count, CPU)
    w13, w2 = (unpack(each.expert(0)) for each in stacks)
    rows = torch.arange(len(w13.codes)).view(-1, 2, 8)
    gate, up_ = (
        replace(
            w13,
            codes=w13.codes[each],
            scales=w13.scales[each],
            zeros=None if w13.zeros is None else w13.zeros[each],
        )
        for each in (rows[:, 0].flatten(), rows[:, 1].flatten())
    )
    known = dict.fromkeys(range(up.shard.count), reference.Expert(gate, up_, w2))
    x = torch.randn(5, up.k).bfloat16()
    expected = reference.experts(x, routing.weights, routing.ids, known)
    ours = expert_contenders.fused_experts(up, down, routing, stacks)
    found = ours.runs[0](x, torch.empty(0))
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


def test_unquantized_experts_give_what_einsum_gives() -> None:
    up, down = experts_of(MIXTURE)
    weights = expert_contenders.dense_experts(up, down, torch.float32, CPU)
    routing = expert_contenders.Routing.uniform(6, 2, up.shard.count, CPU)
    x = torch.randn(6, up.k)
    found = expert_contenders.unquantized_experts(weights, routing).runs[0](x, torch.empty(0))
    w13, w2 = (torch.stack(each) for each in zip(*weights, strict=True))
    hidden = torch.einsum("mk,enk->men", x, w13)
    gate, way_up = hidden.tensor_split(2, dim=2)
    every = torch.einsum("men,ekn->mek", torch.nn.functional.silu(gate) * way_up, w2)
    asked = torch.zeros(6, len(w13)).scatter_(1, routing.ids.long(), routing.weights)
    torch.testing.assert_close(found, torch.einsum("me,mek->mk", asked, every))


def test_embeddings_that_are_looked_up_are_named_as_not_timed() -> None:
    plan = plans("tiny-llama-ct-tied")[0]
    (gather,) = (use for use in plan.uses if use.op is Op.EMBEDDING)
    looked_up = replace(plan, uses=(gather,))
    others = plans("tiny-llama-ct-tied")[1:2]
    found = bench((looked_up, *others), (1,), CPU, "a CPU", lambda *now: None, rounds=3)
    assert found.skipped == (plan.name,)
    assert len(found.rows) == 1


def test_calls_take_turns_and_copies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    calls = {
        name: [lambda name=name, i=i: called.append(f"{name}{i}") for i in range(2)]
        for name in "ab"
    }
    times = by_turns(calls, rounds=3)
    assert called == ["a0", "b0", "a1", "b1", "a0", "b0", "a1", "b1"]
    assert {name: timing.samples for name, timing in times.items()} == {"a": 3, "b": 3}
    called.clear()
    assert by_turns(calls, rounds=50, seconds=0)["a"].samples == timing._MIN_ROUNDS


def test_a_cpu_gets_copies_that_exceed_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "MAX_COPIES", 64)
    assert [len(copies(size, CPU)) for size in (1e9, 30e6, 1e3)] == [2, 4, 64]


def test_headers_alone_are_enough(tmp_path: Path) -> None:
    """Weights that are holes in sparse files, of which none is read."""
    write_headers(tmp_path, MODELS["Qwen2.5-0.5B"])
    found = document(str(tmp_path), "--tokens", "1", "--rounds", "3", "--only", "o_proj")
    (layer,) = found["layers"]
    assert (layer["count"], layer["out_features"], layer["in_features"]) == (24, 896, 896)
    assert found["steps"][0]["us"] == pytest.approx(24 * layer["us"])
    assert found["served"] == []


def test_tables_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undecoded, "load", cpu_fused.load)
    plot = tmp_path / "bench.png"
    model = str(asset("tiny-llama-awq-g128"))
    result = fusedq(model, "--tokens", "1", "--rounds", "3", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "cpu-fused" in line]
    assert Counter(words[-8] for words in rows) == {"1": 4}
    assert "1 token " in result.stdout
    assert "% decoding" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_a_compiler_the_plot_shows_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undecoded, "load", refuse := Mock(side_effect=BuildError("no compiler")))
    plot, model = tmp_path / "bench.png", str(asset("tiny-llama-awq-g128"))
    found = fusedq(model, "--tokens", "1", "--rounds", "3", "--plot", str(plot), "--json")
    assert found.exit_code == 0, found.output
    assert "what decoding costs is not measured: no compiler" in found.stderr
    assert {layer["decoding"] for layer in json.loads(found.stdout)["layers"]} == {None}
    assert plot.read_bytes().startswith(b"\x89PNG")
    refuse.assert_called_once()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "device 'tpu'; choose auto, cpu or cuda"),
        (("--dtype", "float32"), "dtype 'float32'; choose bfloat16 or float16"),
        (("--tokens", "0"), "--tokens start at 1"),
        (("--batches", "x"), "is not a list of numbers"),
        (("--only", "nothing"), "no quantized layer's name holds 'nothing'"),
        (("--rounds", "2"), "rounds"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = fusedq(str(asset("tiny-llama-awq-g128")), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = str(asset("tiny-llama-awq-g128"))
    result = fusedq(str(asset("tiny-llama-bf16")))
    assert result.exit_code == 1
    assert "this checkpoint is not quantized" in result.stderr
    result = fusedq(model, "--plot", str(tmp_path / "no" / "b.png"))
    assert result.exit_code == 3
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    result = fusedq(model, "--plot", str(tmp_path / "b.png"))
    assert result.exit_code == 1
    assert "--plot needs matplotlib" in result.stderr


RATES = {
    "imported": 5.0,
    "ready": 20.0,
    "first_token": 20.5,
    "later_first_tokens": [0.01, 0.02, 0.04],
    "decode": {"1": [9.0, 11.0, 10.0]},
}
LOG = """Loading weights took 1.5 seconds
repacking: 0.8 s, ... warm-up: 3.2 s
init engine (profile, create kv cache, warmup model) took 11.5 s
torch.compile took 9.25 s in total
"""


def test_the_start_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_apart(module, what, request, folder, on_report, env) -> str:
        asked.append((request, env))
        if request["engine"]["quantization"] is None:
            raise EngineError("m (stock vLLM): it cannot")
        (folder / "rates.json").write_text(json.dumps(RATES))
        return LOG

    monkeypatch.setattr(serving, "run_apart", run_apart)
    ours, stock = serving.serve(
        "m", "bfloat16", "main", {"kernel": "auto"}, [1, 8], lambda way: None
    )
    assert ours.values == {
        "process start to first token, s": 20.5,
        "  importing vLLM, s": 5.0,
        "  building the engine, s": 15.0,
        "    reading and loading weights, s": 1.5,
        "      of it repacking, s": 0.8,
        "      of it warm-up of kernels, s": 3.2,
        "    profiling, KV cache, compiling, warm-up of the engine, s": 11.5,
        "      of it torch.compile, s": 9.25,
        "  first token of the first request, s": 0.5,
        "time to first token when warm, ms": 20.0,
        "decode, batch 1, tokens/s": 10.0,
    }
    assert (stock.values, stock.failed) == ({}, "m (stock vLLM): it cannot")
    (request, env), (other, _) = asked
    assert request["engine"]["additional_config"] == {"fusedq": {"kernel": "auto"}}
    assert "additional_config" not in other["engine"]
    assert request["engine"]["revision"] == "main"
    assert request["engine"]["max_num_seqs"] == 8
    # Both sides compile anew
    assert {name for name in env if "CACHE" in name} == {
        "VLLM_CACHE_ROOT",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
    }
    assert "20.50" in render(serving_table([ours, stock]))


def test_compiling_on_a_cpu_is_timed_by_the_clock_of_the_log() -> None:
    log = (
        "(Engine 1) INFO 11-30 23:59:50 [runner.py:87] Warming up model for the compilation...\n"
        "(Engine 1) INFO 12-01 00:00:07 [runner.py:91] Warming up done.\n"
    )
    assert serving.log_metrics(log) == {"cpu_compile_s": 17.0}
    assert serving.log_metrics(log.splitlines()[0]) == {}


def test_a_model_that_fusedq_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_apart(*arguments: object) -> str:
        raise EngineError("no")

    monkeypatch.setattr(serving, "run_apart", run_apart)
    with pytest.raises(EngineError, match="no"):
        serving.serve("m", "bfloat16", None, {}, [1], lambda way: None)


def test_reading_is_of_all_its_bytes() -> None:
    found = contenders.reading(CPU)
    assert isinstance(found, Contender)
    assert found.bytes == 1 << 20
    assert found.runs[0](torch.empty(0), torch.empty(0)) == found.bytes / 4


def test_tokens_that_no_memory_holds_are_told() -> None:
    result = fusedq(str(asset("tiny-llama-awq-g128")), "--tokens", "100000000000")
    assert result.exit_code == 1, result.output
    told = " ".join(result.stderr.split())
    assert "model.layers.0-1." in told
    assert "does not fit the memory of" in told
    assert "ask for fewer --tokens, or raise -tp" in told
