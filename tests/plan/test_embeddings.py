"""Quantized input embeddings: what is planned, which rows a rank looks up, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from checkpoints import (
    ORDERED_BUILDS,
    Tensors,
    Truth,
    make_plain,
    rename,
    write_checkpoint,
    write_json,
)
from embeddings import EMBEDDING, VOCABULARY, write_with_embedding
from fusedq_kernels.catalogue import Op
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.ops import embedding
from fusedq_kernels.reference import dequantize
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats import format_for
from vllm_fusedq.formats.shared.vocabulary import is_tied
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.capacity import Demand, capacity_of
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.shards import shard_embedding
from vllm_fusedq.prove.launches import LoadedLayer
from vllm_fusedq.prove.selfcheck import check_layer
from vllm_fusedq.prove.trace import judge, record
from vllm_fusedq.worker.warmup import warm_up

HALF = torch.float16
CPU, GPU = Target(cpu_device(), HALF), Target(device_by_name("h200"), HALF)
STRIPED = replace(CPU, insisted="cpu-striped")
BUILDS = ("ct-sym", "ct-asym", "ct-3bit-asym", "ct-8bit-sym", "ct-int8-asym", "ct-sym-order")


def plan_of(path: Path, target: Target = CPU, tp_size: int = 1, rank: int = 0) -> LayerPlan:
    plans = plan_model(read_checkpoint(path), target, tp_size, ranks=[rank]).layers
    (plan,) = (plan for plan in plans if plan.prefix == EMBEDDING)
    return plan


def load(path: Path, plan: LayerPlan) -> LayerLoader:
    loader = LayerLoader.create(plan, HALF, torch.device("cpu"))
    tensors = load_file(path / "model.safetensors")
    for stored in plan.formats[0].tensors:
        loader.add(stored.name, tensors[f"{EMBEDDING}.{stored.name}"])
    loader.check_complete()
    return loader


def gather_of(plan: LayerPlan) -> str:
    return plan.use(Op.EMBEDDING).call.kernel


def values_of(truth: Truth, hidden: int) -> torch.Tensor:
    return truth.values(0, VOCABULARY, 0, hidden)


@pytest.mark.parametrize(
    ("target", "tied", "expected"),
    [
        (CPU, False, "cpu-gather"),
        (CPU, True, "cpu-gather + cpu-fused"),
        (STRIPED, True, "cpu-gather + cpu-striped"),
        (GPU, False, "triton-gather"),
        (GPU, True, "triton-gather + triton-gemm"),
    ],
)
def test_the_plan_names_the_gather_and_the_kernel_of_a_tied_head(
    tmp_path: Path, target: Target, tied: bool, expected: str
) -> None:
    write_with_embedding(tmp_path, tied=tied)
    checkpoint = read_checkpoint(tmp_path)
    plan = plan_model(checkpoint, target)
    names = {layer.prefix: layer.kernel_names for layer in plan.layers}
    assert names[EMBEDDING] == expected
    assert "lm_head" not in names
    assert plan.unquantized == (() if tied else ("lm_head",))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("build", BUILDS)
def test_every_split_looks_up_the_same_rows(tmp_path: Path, build: str, tied: bool) -> None:
    hidden = 128
    sizes = {"hidden": hidden, "intermediate": 128}
    truth = write_with_embedding(tmp_path, build, tied=tied, **sizes)[EMBEDDING]
    ids = torch.tensor([[0, 31, 7], [8, 15, 16]])
    expected = values_of(truth, hidden)[ids].to(HALF)
    for tp_size in (1, 2, 4):
        total = torch.zeros(*ids.shape, hidden, dtype=HALF)
        for rank in range(tp_size):
            plan = plan_of(tmp_path, CPU, tp_size, rank)
            region = plan.shard.parts[0].region
            packed = load(tmp_path, plan).packed
            # As vLLM does: shift this rank's ids, mask the others, add the ranks
            held = (ids >= region.n_start) & (ids < region.n_stop)
            rows = embedding((ids - region.n_start) * held, packed, gather_of(plan), HALF)
            total += rows.masked_fill(~held[..., None], 0)
        assert torch.equal(total, expected), tp_size


@pytest.mark.parametrize("build", ["ct-asym", "ct-8bit-sym"])
def test_a_tied_head_multiplies_by_the_weight_that_is_looked_up(tmp_path: Path, build: str) -> None:
    truth = write_with_embedding(tmp_path, build, tied=True, hidden=128)[EMBEDDING]
    plan = plan_of(tmp_path, STRIPED)
    packed = load(tmp_path, plan).packed
    assert torch.equal(dequantize(unpack(packed))[:VOCABULARY].double(), values_of(truth, 128))
    # Rows of padding, up to 64 tokens, are worth nothing
    padding = embedding(torch.arange(VOCABULARY, 64), packed, gather_of(plan), HALF)
    assert not padding.any()


def test_a_tied_embedding_is_resident_once(tmp_path: Path) -> None:
    write_with_embedding(tmp_path, "ct-8bit-sym", tied=True, hidden=128)
    checkpoint = read_checkpoint(tmp_path)
    plan = plan_model(checkpoint, GPU)
    found = capacity_of(checkpoint, plan, HALF, Demand(), None)
    (layer,) = (each for each in plan.layers if each.prefix == EMBEDDING)
    # Padded to 128 tokens: one byte a weight, 16-bit scales for groups of 32
    assert dict(layer.resident) == {"qweight": 128 * 128, "scales": 2 * 4 * 128}
    assert found.weights == sum(each.weight_bytes for each in plan.layers)
    # With two pipeline stages the first looks up and the last multiplies, each in a copy
    demand = Demand(pipeline_parallel_size=2)
    last = capacity_of(checkpoint, plan, HALF, demand, None)
    assert last.weights >= layer.weight_bytes


def test_a_gather_takes_sizes_that_no_product_takes(tmp_path: Path) -> None:
    write_with_embedding(tmp_path, tied=False)
    layers = {EMBEDDING: format_for(read_checkpoint(tmp_path)).layer_of(EMBEDDING)}
    # 64 padded rows on 16 ranks are 4 each
    untied, tied = (shard_embedding(EMBEDDING, 32, 64, 16, 0, each) for each in (False, True))
    for target in (CPU, GPU):
        assert plan_layer(untied, layers, target).n == 4
        with pytest.raises(PreflightError, match="found 4 out_features per rank"):
            plan_layer(tied, layers, target)


def test_wide_scales_beside_zero_points_are_refused(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        name = f"{EMBEDDING}.weight_scale"
        tensors[name] = tensors[name].float()

    write_with_embedding(tmp_path, "ct-asym", tied=False, edits=(widen,))
    with pytest.raises(PreflightError, match=r"embed_tokens.*scales in float32 beside zero points"):
        plan_of(tmp_path)


@pytest.mark.parametrize("change", ["ignore", "targets"])
def test_an_embedding_against_the_config_is_refused(tmp_path: Path, change: str) -> None:
    write_with_embedding(tmp_path, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    section = config["quantization_config"]
    if change == "ignore":
        section["ignore"] += ["Embedding"]
    else:
        section["config_groups"]["group_1"]["targets"] = ["re:.*nothing$"]
    write_json(tmp_path / "config.json", config)
    message = (
        r"model.embed_tokens: found packed tensors \(weight_packed, .*\) although the config "
        "leaves this module unquantized; supported: config and tensors that agree; correct "
        "targets and ignore in the config"
    )
    with pytest.raises(PreflightError, match=message):
        plan_of(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_embedding_that_the_config_calls_quantized_is_refused(
    tmp_path: Path, tied: bool
) -> None:
    write_with_embedding(tmp_path, tied=tied, edits=(make_plain(EMBEDDING, VOCABULARY, 64),))
    message = (
        r"model.embed_tokens: found an unquantized weight F16 \[32, 64\] although the config says "
        "that this module is quantized; .*; exclude it by targets and ignore if it is meant to stay"
    )
    with pytest.raises(PreflightError, match=message):
        plan_of(tmp_path)


def test_a_name_that_is_targeted_comes_before_the_class(tmp_path: Path) -> None:
    write_with_embedding(tmp_path, "ct-8bit-sym", tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"]["targets"] = ["re:.*embed_tokens$"]
    # Four bits for the class, which is not what is stored
    groups["group_0"]["targets"] = ["Linear", "Embedding"]
    write_json(tmp_path / "config.json", config)
    assert plan_of(tmp_path).formats[0].description.startswith("compressed-tensors 8-bit")


@pytest.mark.parametrize("build", ["gptq-sym", "awq", "bnb-nf4"])
def test_other_formats_refuse_what_they_do_not_describe(tmp_path: Path, build: str) -> None:
    """GPTQModel groups an embedding along the vocabulary, which is another format."""
    down = "model.layers.0.mlp.down_proj"

    def move(tensors: Tensors) -> None:
        del tensors[f"{EMBEDDING}.weight"]
        rename(down, EMBEDDING)(tensors)

    write_checkpoint(tmp_path, build, layers=2, edits=[move])
    with pytest.raises(PreflightError, match="embed_tokens: found a quantized embedding"):
        plan_of(tmp_path)


def test_position_embeddings_stay_refused(tmp_path: Path) -> None:
    write_with_embedding(tmp_path, tied=False, edits=(rename(EMBEDDING, "model.embed_positions"),))
    with pytest.raises(PreflightError, match="embed_positions: found a quantized embedding"):
        plan_model(read_checkpoint(tmp_path), CPU)


@pytest.mark.parametrize(
    ("config", "has_head", "expected"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, False, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True, True),
        # What is a model's default need not be written down
        ({}, False, True),
        ({}, True, False),
    ],
)
def test_who_is_tied(config: dict, has_head: bool, expected: bool) -> None:
    tensors = {"lm_head.weight": None} if has_head else {"model.norm.weight": None}
    assert is_tied(Checkpoint("", config, {}, "", tensors)) is expected


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("build", ["ct-asym", "ct-8bit-sym", *list(ORDERED_BUILDS)[-1:]])
def test_a_converted_embedding_is_the_same(tmp_path: Path, build: str, tied: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_with_embedding(source, build, tied=tied, hidden=128)
    convert(source, out)
    for target in (CPU, STRIPED):
        wanted, found = plan_of(source, target), plan_of(out, target)
        assert found.kernel_names == wanted.kernel_names
        before, after = load(source, wanted).packed, load(out, found).packed
        for name in ("qweight", "scales", "zeros", "perm"):
            one, other = getattr(before, name), getattr(after, name)
            assert one is other or torch.equal(one, other), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_selfcheck_looks_rows_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    write_with_embedding(tmp_path, "ct-asym-order", tied=tied, hidden=128)
    checkpoint, target = read_checkpoint(tmp_path), STRIPED
    plan = plan_of(tmp_path, STRIPED)
    right = check_layer(checkpoint, plan, target, torch.device("cpu"))
    assert right.passed
    assert (right.max_error > 0) is tied

    def wrong(ids, packed, gather, dtype):
        return embedding(ids, packed, gather, dtype).roll(1, 0)

    monkeypatch.setattr("vllm_fusedq.prove.selfcheck.ops.embedding", wrong)
    assert not check_layer(checkpoint, plan, target, torch.device("cpu")).passed


@pytest.mark.parametrize("build", ["ct-sym", "ct-8bit-asym"])
def test_the_trace_proves_a_lookup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str
) -> None:
    # Slack and stripes would hide a weight of 32 tokens
    monkeypatch.setattr("vllm_fusedq.prove.trace._SLACK_BYTES", 4096)
    write_with_embedding(tmp_path, build, tied=True, hidden=1024)
    plan = plan_of(tmp_path)
    packed, lookup = load(tmp_path, plan).packed, plan.use(Op.EMBEDDING)
    ids = torch.tensor([3])

    def judged(call) -> tuple[str, ...]:
        with (
            profile(record_shapes=True, profile_memory=True) as found,
            record(EMBEDDING, lookup.op),
        ):
            call()
        return judge(plan, lookup, packed, found.events(), 1).problems

    assert judged(lambda: embedding(ids, packed, lookup.call.kernel, HALF)) == ()
    (missing, unseen) = judged(lambda: None)
    assert missing == "0 fused operators in one call"
    assert unseen == "no aten::index in a call"
    (whole,) = judged(
        lambda: (embedding(ids, packed, lookup.call.kernel, HALF), dequantize(unpack(packed)))
    )
    assert whole.startswith("an allocation of ")


@pytest.mark.parametrize(("tied", "launches"), [(False, 1), (True, 2)], ids=["untied", "tied"])
def test_warming_up_looks_up_and_multiplies_where_the_plan_does(
    tmp_path: Path, tied: bool, launches: int
) -> None:
    write_with_embedding(tmp_path, tied=tied)
    plan = plan_of(tmp_path, STRIPED)
    layer = LoadedLayer(plan.prefix, load(tmp_path, plan).packed, plan.uses, has_bias=False)
    assert warm_up([layer, layer], STRIPED, 8).launches == launches
