"""A quantized lm_head: which rows of the vocabulary a rank holds, what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints import write_checkpoint, write_json
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.reference import dequantize
from heads import VOCABULARY, config_with_head, quantized_head
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.shards import UnevenSplit, shard_head

DEVICES = {"cpu": cpu_device(), "gpu": device_by_name("h200")}
HIDDEN = 64


@pytest.mark.parametrize(
    ("vocabulary", "tp_size", "expected"),
    [
        (128, 1, [(0, 128, 0)]),
        (100, 1, [(0, 100, 28)]),
        (100, 2, [(0, 64, 0), (64, 100, 28)]),
        (32, 2, [(0, 32, 0), (32, 32, 32)]),
        (70, 4, [(0, 32, 0), (32, 64, 0), (64, 70, 26), (70, 70, 32)]),
    ],
)
def test_every_rank_holds_its_part_of_the_padded_vocabulary(
    vocabulary: int, tp_size: int, expected: list[tuple[int, int, int]]
) -> None:
    shards = [shard_head("lm_head", vocabulary, HIDDEN, tp_size, rank) for rank in range(tp_size)]
    found = [(s.parts[0].region.n_start, s.parts[0].region.n_stop, s.padding) for s in shards]
    assert found == expected
    assert {shard.n for shard in shards} == {-(-vocabulary // 64) * 64 // tp_size}


def test_a_vocabulary_that_cannot_be_cut() -> None:
    with pytest.raises(UnevenSplit, match="64 padded vocabulary entries cannot be cut into 3"):
        shard_head("lm_head", 50, HIDDEN, 3, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "build", ["gptq-sym", "gptq-asym", "gptq-asym-order", "ct-sym", "ct-asym", "ct-sym-order"]
)
def test_rows_are_exact_and_padding_is_worth_nothing(
    tmp_path: Path, build: str, device: str
) -> None:
    truth, edit = quantized_head(build, HIDDEN)
    sizes = {"hidden": HIDDEN, "intermediate": 128}
    write_checkpoint(tmp_path, build, edits=[edit], config=config_with_head(build), **sizes)
    checkpoint = read_checkpoint(tmp_path)
    target = Target(DEVICES[device], torch.float16)
    for tp_size in (1, 2, 4):
        rows = []
        for rank in range(tp_size):
            plans = plan_model(checkpoint, target, tp_size, ranks=[rank]).layers
            (plan,) = (plan for plan in plans if plan.prefix == "lm_head")
            assert plan.n == 64 // tp_size
            loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
            with safe_open(tmp_path / "model.safetensors", "pt") as file:
                for stored in plan.formats[0].tensors:
                    loader.add(stored.name, file.get_tensor(f"lm_head.{stored.name}"))
            loader.check_complete()
            weight = unpack(loader.packed)
            values = dequantize(weight).double()
            if weight.perm is not None:
                values = torch.zeros_like(values).index_add_(1, weight.perm.long(), values)
            rows.append(values)
        values = torch.cat(rows)
        # Rank after rank the rows follow each other: vLLM cuts the padding off at the end
        assert torch.equal(values[:VOCABULARY], truth.values(0, VOCABULARY, 0, HIDDEN))
        assert not values[VOCABULARY:].any()


def test_a_tied_lm_head_is_refused(tmp_path: Path) -> None:
    _, edit = quantized_head("gptq-sym", HIDDEN)
    config = config_with_head("gptq-sym")
    write_checkpoint(tmp_path, "gptq-sym", hidden=HIDDEN, edits=[edit], config=config)
    checkpoint = read_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {**checkpoint.config, "tie_word_embeddings": True})
    message = (
        "lm_head: found a quantized lm_head although tie_word_embeddings is true in config.json; "
        "supported: a quantized lm_head of its own; set tie_word_embeddings to false"
    )
    with pytest.raises(PreflightError, match=message):
        plan_model(read_checkpoint(tmp_path), Target(DEVICES["cpu"], torch.float16))


@pytest.mark.parametrize(
    ("build", "config", "setting"),
    [
        ("gptq-sym", {"lm_head": False}, "the entry lm_head"),
        ("gptq-sym", {"lm_head": True, "dynamic": {"-:lm_head": {}}}, "the entry lm_head"),
        ("ct-sym", {"ignore": ["lm_head"]}, "targets and ignore"),
    ],
)
def test_a_quantized_lm_head_that_the_config_excludes_is_refused(
    tmp_path: Path, build: str, config: dict[str, object], setting: str
) -> None:
    _, edit = quantized_head(build, HIDDEN)
    write_checkpoint(tmp_path, build, hidden=HIDDEN, edits=[edit], config=config)
    (problem,) = problems_of(tmp_path)
    assert problem.layer == "lm_head"
    assert problem.found.startswith("packed tensors (")
    assert problem.found.endswith(") although the config leaves this module unquantized")
    assert problem.supported == "config and tensors that agree"
    assert problem.fix == f"correct {setting} in the config"


@pytest.mark.parametrize(
    ("build", "setting"), [("gptq-sym", "the entry lm_head"), ("ct-sym", "targets and ignore")]
)
def test_a_plain_lm_head_that_the_config_calls_quantized_is_refused(
    tmp_path: Path, build: str, setting: str
) -> None:
    write_checkpoint(tmp_path, build, hidden=HIDDEN, config=config_with_head(build))
    (problem,) = problems_of(tmp_path)
    assert problem.layer == "lm_head"
    assert problem.found == (
        f"an unquantized weight F16 [{VOCABULARY}, {HIDDEN}] although the config says that this "
        "module is quantized"
    )
    assert problem.supported == "config and tensors that agree"
    assert problem.fix == f"exclude it by {setting} if it is meant to stay unquantized"


@pytest.mark.parametrize("build", ["gptq-sym", "ct-sym"])
def test_a_tied_model_has_no_lm_head_to_call_quantized(tmp_path: Path, build: str) -> None:
    """Llama's config may say so of a file that stores the embeddings a second time as lm_head."""
    write_checkpoint(tmp_path, build, hidden=HIDDEN, config=config_with_head(build))
    config = read_checkpoint(tmp_path).config
    write_json(tmp_path / "config.json", {**config, "tie_word_embeddings": True})
    plan = plan_model(read_checkpoint(tmp_path), Target(DEVICES["cpu"], torch.float16))
    assert "lm_head" in plan.unquantized


def problems_of(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(PreflightError) as error:
        plan_model(read_checkpoint(path), Target(DEVICES["cpu"], torch.float16))
    return error.value.problems
