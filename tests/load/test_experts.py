"""Experts packed one by one into their stacks: bits, memory, and what is wrong with one of them."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints import ALL_BUILDS, ORDERED_BUILDS, put, replace
from fusedq_kernels.choose.device import cpu_device
from memory import peak_of
from mixtures import COUNT, INNER, assert_holds, write_mixture
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.experts import ExpertsLoader
from vllm_fusedq.plan.experts import ExpertSplit
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import CUT, plan_model

TARGET = Target(cpu_device(), torch.float16, keeps_activations=True)
STACK = "model.layers.0.mlp.experts"
SPREAD = ExpertSplit(parallel=True)


def plans_of(
    path: Path, tp_size: int = 1, rank: int = 0, split: ExpertSplit = CUT
) -> list[LayerPlan]:
    plan = plan_model(read_checkpoint(path), TARGET, tp_size, ranks=[rank], split=split)
    return [each for each in plan.layers if each.prefix == STACK]


def load(path: Path, plans: list[LayerPlan]) -> list[ExpertsLoader]:
    """As vLLM does: every tensor of every expert, in the order of the file."""
    loaders = [ExpertsLoader.create(plan, torch.float16, torch.device("cpu")) for plan in plans]
    parts = {"gate_proj": (0, "w1"), "up_proj": (0, "w3"), "down_proj": (1, "w2")}
    with safe_open(path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(f"{STACK}."):
                number, module, suffix = name.removeprefix(f"{STACK}.").split(".", 2)
                side, part = parts[module]
                taken = loaders[side].add(suffix, file.get_tensor(name), part, int(number))
                assert taken == (int(number) in plans[side].experts)
    for loader in loaders:
        loader.check_complete()
    return loaders


@pytest.mark.parametrize("build", ALL_BUILDS)
def test_every_build_is_resident_exactly(tmp_path: Path, build: str) -> None:
    # Its blocks are of 64 in_features
    inner = 128 if build == "awq-gemv-fast" else INNER
    mixture = write_mixture(tmp_path, build, inner=inner)
    assert_holds(load(tmp_path, plans_of(tmp_path)), mixture, (0, inner))


@pytest.mark.parametrize(
    "build", ["awq", "gptq-sym", "ct-asym", "bnb-nf4-nested", "fp8-block", *ORDERED_BUILDS]
)
def test_a_rank_inside_a_group_is_resident_exactly(tmp_path: Path, build: str) -> None:
    mixture = write_mixture(tmp_path, build)
    for rank in range(2):
        half = (rank * INNER // 2, (rank + 1) * INNER // 2)
        assert_holds(load(tmp_path, plans_of(tmp_path, 2, rank)), mixture, half)


@pytest.mark.parametrize("build", ["awq", "gptq-asym-order"])
def test_an_expert_parallel_rank_takes_its_own(tmp_path: Path, build: str) -> None:
    mixture = write_mixture(tmp_path, build, count=5)
    for rank, held in enumerate([(0, 1, 2), (3, 4)]):
        loaders = load(tmp_path, plans_of(tmp_path, 2, rank, SPREAD))
        assert loaders[0].plan.experts == held
        assert_holds(loaders, mixture)


@pytest.mark.parametrize("build", ["gptq-asym", "ct-sym-order", "bnb-nf4"])
def test_a_converted_checkpoint_holds_the_same_experts(tmp_path: Path, build: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_mixture(source, build)
    convert(source, out)
    for tp_size, rank, split in ((1, 0, CUT), (2, 1, CUT), (2, 1, SPREAD)):
        wanted, found = (load(path, plans_of(path, tp_size, rank, split)) for path in (source, out))
        for one, other in zip(wanted, found, strict=True):
            for name in ("qweight", "scales", "perm"):
                a, b = getattr(one.packed, name), getattr(other.packed, name)
                assert (a is None and b is None) or torch.equal(a, b)


def test_experts_cost_one_expert_more_than_they_hold(tmp_path: Path) -> None:
    write_mixture(tmp_path, count=8, hidden=256, inner=256, group_size=128)
    plans = plans_of(tmp_path)
    _, peak = peak_of(lambda: load(tmp_path, plans), tmp_path)
    held = sum(size for plan in plans for _, size in plan.resident)
    expert = held // 8
    assert held < peak <= held + 3 * expert


def test_tensors_that_never_came_are_named_together(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    _, plan = plans_of(tmp_path)
    loader = ExpertsLoader.create(plan, torch.float16, torch.device("cpu"))
    message = (
        f"{STACK}.w2: {3 * COUNT} tensors were never loaded "
        f"({STACK}.0-3.down_proj.qweight, {STACK}.0-3.down_proj.qzeros, "
    )
    with pytest.raises(WeightLoadError) as error:
        loader.check_complete()
    assert str(error.value).startswith(message)


def test_a_bad_scale_names_its_expert(tmp_path: Path) -> None:
    bad = f"{STACK}.2.up_proj.scales"
    write_mixture(tmp_path, edits=[put(bad, (0, 0), float("nan"))])
    with pytest.raises(WeightLoadError, match=f"{bad}: found 1 NaN or infinite values"):
        load(tmp_path, plans_of(tmp_path))


def test_each_rank_has_its_biases_and_the_first_alone_that_of_w2(tmp_path: Path) -> None:
    """Their sums are added up over the ranks."""
    sizes = {"gate_proj": INNER, "up_proj": INNER, "down_proj": 64}
    biases = {
        (number, name): torch.randn(size).half()
        for number in range(COUNT)
        for name, size in sizes.items()
    }

    def biased(tensors: dict[str, torch.Tensor]) -> None:
        for (number, name), bias in biases.items():
            tensors[f"{STACK}.{number}.{name}.bias"] = bias

    write_mixture(tmp_path, edits=[biased])
    for rank in range(2):
        w13, w2 = load(tmp_path, plans_of(tmp_path, 2, rank))
        half = slice(rank * INNER // 2, (rank + 1) * INNER // 2)
        for number in range(COUNT):
            gate, up = (biases[number, name][half].view(-1, 8) for name in sizes if name[0] != "d")
            assert torch.equal(w13.bias[number], torch.stack([gate, up], dim=1).flatten())
            assert torch.equal(w2.bias[number], biases[number, "down_proj"] * (rank == 0))


def test_a_bias_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    def biased(tensors: dict[str, torch.Tensor]) -> None:
        for number in range(COUNT):
            tensors[f"{STACK}.{number}.down_proj.bias"] = torch.ones(64, dtype=torch.float16)

    bad = f"{STACK}.1.down_proj.bias"
    for name, edit, message in (
        ("short", replace(bad, lambda t: t[:32]), rf"{bad}: found a bias \[32\], expected \[64\]"),
        ("nan", put(bad, (3,), float("nan")), f"{bad}: found 1 NaN or infinite values"),
    ):
        write_mixture(tmp_path / name, edits=[biased, edit])
        with pytest.raises(WeightLoadError, match=message):
            load(tmp_path / name, plans_of(tmp_path / name))
    write_mixture(tmp_path / "good", edits=[biased])
    _, plan = plans_of(tmp_path / "good")
    loader = ExpertsLoader.create(plan, torch.float16, torch.device("cpu"))
    assert f"{STACK}.3.down_proj.bias" in loader.missing()


def test_a_tensor_of_another_shape_names_its_expert(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    plan, _ = plans_of(tmp_path)
    loader = ExpertsLoader.create(plan, torch.float16, torch.device("cpu"))
    message = f"{STACK}.1.gate_proj.scales: loaded as torch.float16"
    with pytest.raises(WeightLoadError, match=message):
        loader.add("scales", torch.zeros(3, 5, dtype=torch.float16), "w1", 1)
    with pytest.raises(WeightLoadError, match=f"{STACK}.1.w13: vLLM loads part 'w2', but the plan"):
        loader.add("scales", torch.zeros(2, 96, dtype=torch.float16), "w2", 1)
