"""Experts by their headers: what a rank holds of them, and each that is not like the others."""

import json
from dataclasses import replace as with_fields
from pathlib import Path

import pytest
import torch

from checkpoints import BITSANDBYTES_BUILDS, BUILDS, add, drop, make_plain, rename, replace
from fusedq_kernels.activation import SILU
from fusedq_kernels.call import ExpertsCall
from fusedq_kernels.catalogue import Op
from fusedq_kernels.choose import expert_memory, experts
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.types import TILED_LAYOUTS, DeviceSpec, Launch
from mixtures import COUNT, HIDDEN, INNER, write_mixture
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.plan.capacity import Demand, capacity_of
from vllm_fusedq.plan.experts import ExpertSplit, experts_told, local_experts
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import CUT, plan_model
from vllm_fusedq.plan.shards import UnevenSplit
from vllm_fusedq.report.table import plan_rows

CPU = Target(cpu_device(), torch.float16, keeps_activations=True)
STACK = "model.layers.0.mlp.experts"
SPREAD = ExpertSplit(parallel=True)
H200 = Target(device_by_name("h200"), torch.float16)


def stacks(
    path: Path, tp_size: int = 1, rank: int = 0, split: ExpertSplit = CUT, target: Target = CPU
) -> tuple[LayerPlan, LayerPlan]:
    plans = plan_model(read_checkpoint(path), target, tp_size, ranks=[rank], split=split).layers
    first, second = (plan for plan in plans if plan.prefix == STACK)
    return first, second


def problems(path: Path, tp_size: int = 1, split: ExpertSplit = CUT) -> tuple[Problem, ...]:
    with pytest.raises(PreflightError) as error:
        plan_model(read_checkpoint(path), CPU, tp_size, split=split)
    return error.value.problems


@pytest.mark.parametrize("build", [*BUILDS, *BITSANDBYTES_BUILDS, "fp8-block"])
def test_a_layer_of_experts_is_two_weights(tmp_path: Path, build: str) -> None:
    write_mixture(tmp_path, build)
    w13, w2 = stacks(tmp_path)
    assert [plan.name for plan in (w13, w2)] == [f"{STACK}.w13", f"{STACK}.w2"]
    assert (w13.n, w13.k, w2.n, w2.k) == (2 * INNER, HIDDEN, HIDDEN, INNER)
    for plan, parts in ((w13, ("w1", "w3")), (w2, ("w2",))):
        assert plan.experts == tuple(range(COUNT))
        assert [part.shard_id for part in plan.shard.parts] == COUNT * list(parts)
        assert plan.shard.ops == (Op.EXPERTS,)
        assert plan.main.call.kernel == "cpu-fused"
        assert plan.layout is TILED_LAYOUTS[plan.spec.weight_type]
        assert plan.weight_bytes == COUNT * plan.of_expert(0).weight_bytes
    assert [part.module for part in w13.of_expert(2).shard.parts] == [
        f"{STACK}.2.gate_proj",
        f"{STACK}.2.up_proj",
    ]


def test_tensor_parallel_ranks_cut_every_expert(tmp_path: Path) -> None:
    """A rank of two begins 48 of 96 features into an expert, in the middle of a group of 32."""
    write_mixture(tmp_path)
    w13, w2 = stacks(tmp_path, tp_size=2, rank=1)
    assert w13.experts == w2.experts == tuple(range(COUNT))
    assert (w13.n, w13.k, w2.n, w2.k, w2.phase) == (INNER, HIDDEN, HIDDEN, INNER // 2, 16)
    region = w13.shard.parts[0].region
    assert (region.n_start, region.n_stop) == (INNER // 2, INNER)


def test_data_parallel_copies_cut_experts_further(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    w13, _ = stacks(tmp_path, tp_size=2, rank=3, split=ExpertSplit(data_size=3))
    region = w13.shard.parts[0].region
    assert (region.n_start, region.n_stop) == (3 * INNER // 6, 4 * INNER // 6)
    _, w2 = stacks(tmp_path, tp_size=2, rank=3, split=ExpertSplit(parallel=True, data_size=2))
    assert (w2.experts, w2.k) == ((3,), INNER)


def test_expert_parallel_ranks_hold_whole_experts(tmp_path: Path) -> None:
    write_mixture(tmp_path, count=5)
    held = [stacks(tmp_path, 2, rank, SPREAD)[0] for rank in range(2)]
    assert [plan.experts for plan in held] == [(0, 1, 2), (3, 4)]
    assert {(plan.n, plan.k, plan.phase) for plan in held} == {(2 * INNER, HIDDEN, 0)}
    assert held[1].of_expert(0).name == f"{STACK}.3.w13"
    assert [experts_told(plan.experts) for plan in held] == ["3 experts", "experts 3-4"]
    # The attention layer beside them is cut as ever
    plan = plan_model(read_checkpoint(tmp_path), CPU, 2, split=SPREAD)
    assert [each.k for each in plan.layers if each.prefix.endswith("o_proj")] == [HIDDEN // 2]


def test_experts_are_spread_as_vllm_spreads_them() -> None:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    for count, ranks in ((8, 1), (8, 3), (5, 2), (60, 8), (7, 7)):
        for rank in range(ranks):
            local, places, _ = determine_expert_map(ranks, rank, count)
            here = range(count) if places is None else (places >= 0).nonzero()[:, 0].tolist()
            assert list(local_experts(count, ranks, rank)) == list(here)
            assert len(here) == local
    with pytest.raises(UnevenSplit, match="4 experts cannot be spread over 5 ranks"):
        local_experts(4, 5, 0)


def test_a_table_folds_experts(tmp_path: Path) -> None:
    write_mixture(tmp_path, layers=2)
    plan = plan_model(read_checkpoint(tmp_path), CPU)
    rows = {row.name: row for row in plan_rows(plan.layers)}
    name = "model.layers.0-1.mlp.experts.w13 x2 (4 experts)"
    assert rows[name].resident["qweight"] == 2 * rows[name].plan.weight_bytes
    found = capacity_of(read_checkpoint(tmp_path), plan, CPU.act_dtype, Demand(), None)
    assert found.weights == sum(layer.weight_bytes for layer in plan.layers)
    # Routers alone are loaded as they are stored
    assert found.unquantized == 2 * COUNT * HIDDEN * 2


@pytest.mark.parametrize("build", ["awq", "bnb-nf4"])
def test_what_other_ranks_hold_is_no_ranks_memory(tmp_path: Path, build: str) -> None:
    bias = torch.zeros(INNER, dtype=torch.float16)
    names = [f"{number}.{name}" for number in range(COUNT) for name in ("gate_proj", "up_proj")]
    edits = [add(f"{STACK}.{name}.bias", bias.clone()) for name in names]
    write_mixture(tmp_path, build, edits=edits)
    checkpoint = read_checkpoint(tmp_path)
    found = {
        split.parallel: capacity_of(
            checkpoint, plan_model(checkpoint, CPU, 2, split=split), CPU.act_dtype, Demand(), None
        )
        for split in (CUT, SPREAD)
    }
    # The router, on every rank
    assert found[True].unquantized == found[False].unquantized == COUNT * HIDDEN * 2


def test_w2_may_be_quantized_otherwise_than_w13(tmp_path: Path) -> None:
    rule = {r"+:.*down_proj": {"group_size": 16}}

    def of_16(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "down_proj" in name]:
            if name.endswith(("scales", "qzeros")):
                tensors[name] = tensors[name].repeat_interleave(2, 0)
            if name.endswith("g_idx"):
                tensors[name] = torch.arange(INNER).int() // 16

    write_mixture(tmp_path, "gptq-sym", config={"dynamic": rule}, edits=[of_16])
    w13, w2 = stacks(tmp_path)
    assert (w13.spec.group_size, w2.spec.group_size) == (32, 16)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    """Whether it is the last, by config.json, or one of its matrices."""
    gone = f"{STACK}.3."

    def drop_last(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(gone)]:
            del tensors[name]

    write_mixture(tmp_path / "last", edits=[drop_last])
    found = problems(tmp_path / "last")
    assert [each.layer for each in found] == [
        f"{gone}{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert found[0].found == "no such module, where 3 experts have a quantized one"
    module = f"{STACK}.1.up_proj"
    suffixes = ("qweight", "qzeros", "scales")
    write_mixture(tmp_path / "one", edits=[drop(f"{module}.{suffix}") for suffix in suffixes])
    assert [each.layer for each in problems(tmp_path / "one")] == [module]


def test_an_unquantized_expert_is_named(tmp_path: Path) -> None:
    module = f"{STACK}.2.down_proj"
    config = {"modules_to_not_convert": ["experts.2.down_proj"]}
    edits = [make_plain(module, HIDDEN, INNER)]
    write_mixture(tmp_path, config=config, edits=edits)
    (found,) = problems(tmp_path)
    assert (found.layer, found.found.partition(",")[0]) == (module, "an unquantized weight")


def test_an_expert_of_another_scheme_is_named(tmp_path: Path) -> None:
    module = f"{STACK}.3.gate_proj"
    write_mixture(tmp_path / "dtype", edits=[replace(f"{module}.scales", lambda t: t.bfloat16())])
    (found,) = problems(tmp_path / "dtype")
    assert found.layer == module
    assert found.found == (
        "[96, 64] awq 4-bit g32, zero points, scales in bfloat16, where most experts of the layer "
        "have [96, 64] awq 4-bit g32, zero points, scales in float16"
    )
    assert found.fix == "quantize the model again with all experts of a layer alike"
    edits = [replace(f"{module}.{name}", lambda t: t[:, : t.shape[1] // 2]) for name in SUFFIXES]
    write_mixture(tmp_path / "size", edits=edits)
    (found,) = problems(tmp_path / "size")
    assert found.found.startswith("[48, 64] awq")


SUFFIXES = ("qweight", "qzeros", "scales")


def test_matrices_that_do_not_fit_each_other(tmp_path: Path) -> None:
    edits = [
        replace(f"{STACK}.{number}.down_proj.{name}", lambda t: t[:, : t.shape[1] // 2])
        for number in range(COUNT)
        for name in SUFFIXES
    ]
    write_mixture(tmp_path, edits=edits)
    (found,) = problems(tmp_path)
    assert found.layer == STACK
    assert found.found == "experts of [96, 64] on the way in and [32, 96] on the way back"


def test_biases_of_some_experts_are_refused_and_of_all_counted(tmp_path: Path) -> None:
    bias = torch.zeros(INNER, dtype=torch.float16)
    names = [
        f"{STACK}.{number}.{name}" for number in range(COUNT) for name in ("gate_proj", "up_proj")
    ]
    all_but_one = [add(f"{name}.bias", bias.clone()) for name in names[1:]]
    write_mixture(tmp_path / "some", edits=all_but_one)
    (found,) = problems(tmp_path / "some")
    assert (found.layer, found.found) == (names[0], "no bias, which 7 of 8 like it have")
    matrix = add(f"{names[0]}.bias", bias[None])
    write_mixture(tmp_path / "shape", edits=[*all_but_one, matrix])
    (found,) = problems(tmp_path / "shape")
    assert (found.layer, found.found) == (names[0], "a bias F16 [1, 96]")
    write_mixture(tmp_path / "all", edits=[*all_but_one, add(f"{names[0]}.bias", bias)])
    w13, w2 = stacks(tmp_path / "all", tp_size=2)
    assert dict(w13.resident)["bias"] == COUNT * INNER * 2
    assert "bias" not in dict(w2.resident)


def test_damaged_experts_of_all_layers_fold(tmp_path: Path) -> None:
    edits = [
        drop(f"model.layers.{layer}.mlp.experts.{number}.up_proj.scales")
        for layer in range(3)
        for number in (0, 1, 3)
    ]
    write_mixture(tmp_path, layers=3, edits=edits)
    (found,) = problems(tmp_path)
    assert found.layer == "model.layers.0-2.mlp.experts.0-1,3.up_proj (9 layers)"


def test_experts_of_other_kinds(tmp_path: Path) -> None:
    """One matrix alone, a matrix of an unknown name, all experts in one tensor."""
    without = [
        drop(f"{STACK}.{number}.up_proj.{name}") for number in range(COUNT) for name in SUFFIXES
    ]
    write_mixture(tmp_path / "plain", edits=without)
    (found,) = problems(tmp_path / "plain")
    assert found.found == "experts without w3 (only down_proj, gate_proj)"
    other = [rename(f"{STACK}.{number}.up_proj", f"{STACK}.{number}.v1") for number in range(COUNT)]
    write_mixture(tmp_path / "other", edits=other)
    (found,) = problems(tmp_path / "other")
    assert found.layer == f"{STACK}.0-3.v1 (4 layers)"
    assert found.found == "a quantized v1 of an expert"
    words = torch.zeros(COUNT, HIDDEN, 8, dtype=torch.int32)
    write_mixture(tmp_path / "one", edits=[add(f"{STACK}.mlp.w1.qweight", words)])
    (found,) = problems(tmp_path / "one")
    assert found.layer == f"{STACK}.mlp.w1"
    assert found.found == "packed tensors of all experts of a layer at once"


@pytest.mark.parametrize("target", [CPU, H200], ids=["cpu", "h200"])
def test_experts_without_gates(tmp_path: Path, target: Target) -> None:
    """vLLM's loaders call the way up of Nemotron's experts w1."""
    edits = [
        drop(f"{STACK}.{number}.gate_proj.{name}") for number in range(COUNT) for name in SUFFIXES
    ]
    write_mixture(tmp_path, edits=edits)
    w13, w2 = stacks(tmp_path, tp_size=2, rank=1, target=target)
    assert (w13.n, w13.k, w2.n, w2.k) == (INNER // 2, HIDDEN, HIDDEN, INNER // 2)
    assert {(part.shard_id, part.module[-7:]) for part in w13.shard.parts} == {("w1", "up_proj")}
    assert not w13.shard.alternating
    lacking = [*edits, *(drop(f"{STACK}.2.up_proj.{name}") for name in SUFFIXES)]
    write_mixture(tmp_path / "lacking", edits=lacking)
    (found,) = problems(tmp_path / "lacking")
    assert (found.layer, found.found) == (
        f"{STACK}.2.up_proj",
        "no such module, where 3 experts have a quantized one",
    )
    one_gate = [edit for edit, number in zip(edits, GATES, strict=True) if number != 1]
    write_mixture(tmp_path / "one", edits=one_gate)
    assert [each.layer for each in problems(tmp_path / "one")] == [
        f"{STACK}.0,2-3.gate_proj (3 layers)"
    ]


GATES = [number for number in range(COUNT) for _ in ("qweight", "qzeros", "scales")]


def test_a_router_is_unquantized_whatever_the_config_says(tmp_path: Path) -> None:
    write_mixture(tmp_path / "plain", "gptq-sym")
    plan = plan_model(read_checkpoint(tmp_path / "plain"), CPU)
    router = "model.layers.0.mlp.gate"
    assert plan.unquantized == (router,)
    words = torch.zeros(8, 8, dtype=torch.int32)
    edits = [drop(f"{router}.weight"), add(f"{router}.qweight", words)]
    write_mixture(tmp_path / "packed", "gptq-sym", edits=edits)
    (found,) = problems(tmp_path / "packed")
    assert (found.layer, found.found) == (router, "a quantized router of experts")


def test_gate_excludes_the_router_and_not_gate_proj(tmp_path: Path) -> None:
    """AutoAWQ matches parts of names, and wrote gate_proj packed nevertheless."""
    write_mixture(tmp_path, config={"modules_to_not_convert": ["gate", "lm_head"]})
    w13, _ = stacks(tmp_path)
    assert w13.experts == tuple(range(COUNT))


def test_sizes_that_ranks_cannot_share(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    found = problems(tmp_path, tp_size=4)
    assert [each.found for each in found] == ["24 in_features per rank"]
    assert found[0].layer.startswith(f"{STACK}.w2 (out_features x in_features [64, 96] full")
    assert found[0].fix.endswith("tensor-parallel sizes that work for the whole model: 1, 2")
    (found,) = problems(tmp_path, 4, ExpertSplit(parallel=True, data_size=2))
    assert found.layer == STACK
    assert found.found == "4 experts cannot be spread over 8 ranks"


@pytest.mark.parametrize("device", ["h200", "a100", "b200", "rtx4090"])
@pytest.mark.parametrize(("tp_size", "split"), [(1, CUT), (2, CUT), (2, SPREAD)], ids=str)
def test_on_a_gpu_both_weights_have_the_launch_of_the_layer(
    tmp_path: Path, device: str, tp_size: int, split: ExpertSplit
) -> None:
    """What runs is chosen for both products at once, by how many of all experts a token asks."""
    write_mixture(tmp_path)
    target = Target(device_by_name(device), torch.float16)
    w13, w2 = stacks(tmp_path, tp_size, tp_size - 1, split, target)
    count = COUNT // tp_size if split.parallel else COUNT
    call = ExpertsCall(count, SILU, w13.main.call, w2.main.call)
    for tokens in (1, 17, 300):
        launch = experts.select(call, experts.Load(tokens, 2, COUNT), target.device)
        for plan, tile in ((w13, launch.up), (w2, launch.down)):
            assert plan.launch(tokens) == Launch("triton-gemm", tile, launch.source)
    assert [tokens for tokens, _ in w13.main.launches] == [1, 2048]
    most = expert_memory.most_scratch(call, 2, COUNT, target.device, 1 << 20)
    assert w13.main.workspace_bytes == w2.main.workspace_bytes == most
    assert w13.main.scratch_bytes(8) < most
    plan = plan_model(read_checkpoint(tmp_path), target, tp_size, split=split)
    found = capacity_of(read_checkpoint(tmp_path), plan, target.act_dtype, Demand(), None)
    assert found.workspace == most
    (row,) = (row for row in plan_rows(plan.layers) if row.plan.shard.weight == "w13")
    assert row.name.startswith(f"{STACK}.w13 (")


def test_a_config_must_say_how_many_experts_a_token_asks(tmp_path: Path) -> None:
    """Of a kernel whose launches depend on it."""
    write_mixture(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["num_experts_per_tok"]
    path.write_text(json.dumps(config))
    assert len(stacks(tmp_path)) == 2
    with pytest.raises(PreflightError) as error:
        stacks(tmp_path, target=H200)
    (found,) = error.value.problems
    assert (found.layer, found.found) == (
        STACK,
        "experts of which nothing says how many a token asks",
    )
    assert "num_experts_per_tok, moe_top_k" in found.supported


def test_devices_and_kernels_without_experts(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    for target, message in (
        (Target(DeviceSpec("npu", "npu"), torch.float16), "quantized experts on device npu, for"),
        (with_fields(CPU, insisted="cpu-wna16"), "quantized experts for kernel cpu-wna16; supp"),
    ):
        with pytest.raises(PreflightError, match=message):
            stacks(tmp_path, target=target)
