"""Whole-checkpoint plans and refusals from headers alone."""

import dataclasses
from pathlib import Path

import pytest
import torch

from checkpoints import BUILDS, drop, make_plain, replace, write_checkpoint
from fusedq_kernels.choose.device import KNOWN_DEVICES, cpu_device, device_by_name
from fusedq_kernels.types import DeviceSpec, Policy, WeightType
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.plan.folding import fold_problems
from vllm_fusedq.plan.layer import Target, plan_layer
from vllm_fusedq.plan.model import plan_model

CPU = Target(cpu_device(), torch.bfloat16)
H200 = Target(device_by_name("h200"), torch.bfloat16)


def problems_of(path: Path, target: Target = H200, tp_size: int = 1) -> tuple[Problem, ...]:
    with pytest.raises(PreflightError) as error:
        plan_model(read_checkpoint(path), target, tp_size)
    return error.value.problems


@pytest.mark.parametrize("build", BUILDS)
def test_every_linear_is_planned_in_vllms_fused_layers(tmp_path: Path, build: str) -> None:
    write_checkpoint(tmp_path, build, layers=2)
    plan = plan_model(read_checkpoint(tmp_path), CPU)
    names = [layer.prefix.removeprefix("model.layers.") for layer in plan.layers]
    assert sorted(names) == sorted(
        f"{i}.{name}"
        for i in range(2)
        for name in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    )
    qkv = next(layer for layer in plan.layers if "0.self_attn.qkv" in layer.prefix)
    assert [part.shard_id for part in qkv.shard.parts] == ["q", "k", "v"]
    assert (qkv.n, qkv.k) == (192, 64)
    assert plan.unquantized == ("lm_head", "model.embed_tokens")
    assert {layer.kernel_names for layer in plan.layers} == {"cpu-fused"}


@pytest.mark.parametrize("name", KNOWN_DEVICES)
def test_every_known_gpu_gets_the_fused_kernel(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, "awq")
    plan = plan_model(read_checkpoint(tmp_path), Target(device_by_name(name), torch.float16))
    assert {layer.kernel_names for layer in plan.layers} == {"triton-gemm"}
    assert all(launch.tile for layer in plan.layers for _, launch in layer.main.launches)


def test_a_kernel_insisted_on_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym")
    insisting = dataclasses.replace(CPU, insisted="cpu-wna16")
    layer = plan_model(read_checkpoint(tmp_path), insisting).layers[0]
    formats = {
        part.module: dataclasses.replace(
            fmt, spec=dataclasses.replace(fmt.spec, weight_type=WeightType.UINT8B128)
        )
        for part, fmt in zip(layer.shard.parts, layer.formats, strict=True)
    }
    assert plan_layer(layer.shard, formats, CPU).kernel_names == "cpu-fused"
    with pytest.raises(PreflightError) as error:
        plan_layer(layer.shard, formats, insisting)
    (problem,) = error.value.problems
    assert problem.layer == layer.prefix
    assert problem.found == "uint8b128 weights for kernel cpu-wna16"
    assert problem.supported == "uint4, uint4b8"
    assert 'choose another "kernel"' in problem.fix


def test_batch_invariant_mode_is_planned_or_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym")
    checkpoint = read_checkpoint(tmp_path)
    plan = plan_model(checkpoint, dataclasses.replace(H200, policy=Policy(batch_invariant=True)))
    launches = [launch for layer in plan.layers for _, launch in layer.main.launches]
    assert all(launch.source.endswith("batch-invariant") for launch in launches)
    policy = Policy(batch_invariant=True)
    insisting = dataclasses.replace(CPU, insisted="cpu-wna16", policy=policy)
    with pytest.raises(PreflightError) as error:
        plan_model(checkpoint, insisting)
    (problem,) = error.value.problems
    assert problem.layer == "device cpu"
    kernels = "(cpu-wna16)"
    assert problem.found == f"kernels without vLLM's batch-invariant mode {kernels}"
    assert problem.supported == "triton-gemm, cpu-fused"
    assert problem.fix == "unset VLLM_BATCH_INVARIANT, or choose one of these"


def test_a_cpu_without_a_compiled_kernel_refuses_but_for_one_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym")
    checkpoint, bare = read_checkpoint(tmp_path), DeviceSpec("cpu", "cpu")
    with pytest.raises(PreflightError) as error:
        plan_model(checkpoint, Target(bare, torch.bfloat16))
    (problem,) = error.value.problems
    assert problem.found == "no C++ compiler, and no cpu-fused compiled for this CPU"
    assert "install g++" in problem.fix
    plan = plan_model(checkpoint, Target(bare, torch.bfloat16, "cpu-striped"))
    assert {layer.kernel_names for layer in plan.layers} == {"cpu-striped"}


def test_resident_bytes_are_those_of_the_packed_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym", hidden=128, intermediate=256, group_size=128)
    down = next(
        layer
        for layer in plan_model(read_checkpoint(tmp_path), H200).layers
        if "down_proj" in layer.prefix
    )
    assert down.weight_bytes == 128 * 256 // 2
    assert down.metadata_bytes == 128 * 2 * 2


def test_every_problem_of_every_layer_is_listed(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        layers=2,
        edits=[
            drop("model.layers.0.mlp.up_proj.scales"),
            replace("model.layers.1.mlp.down_proj.qzeros", lambda t: t[:-1]),
            replace("model.layers.1.self_attn.q_proj.scales", lambda t: t.double()),
        ],
    )
    assert [problem.layer for problem in problems_of(tmp_path)] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_split_that_no_kernel_covers_names_sizes_that_work(tmp_path: Path) -> None:
    # 96 / 4 = 24 in_features per rank: not a multiple of 16.
    write_checkpoint(tmp_path, "awq", layers=3, hidden=64, intermediate=96)
    problem = problems_of(tmp_path, tp_size=4)[0]
    assert problem.layer.startswith("model.layers.0-2.mlp.down_proj")
    assert "[64, 96] full, [64, 24] per rank at tensor_parallel_size 4" in problem.layer
    assert "3 layers" in problem.layer
    assert problem.found == "24 in_features per rank"
    assert problem.fix.endswith("tensor-parallel sizes that work for the whole model: 1, 2")


def test_uneven_split_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq")
    found = problems_of(tmp_path, tp_size=3)
    assert any("cannot be cut into 3 equal parts" in problem.found for problem in found)


def test_parts_of_one_fused_layer_must_share_their_scheme(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    write_checkpoint(
        tmp_path, "gptq-sym", edits=[replace(f"{module}.scales", lambda t: t.bfloat16())]
    )
    problem = problems_of(tmp_path)[0]
    assert problem.layer == "model.layers.0.mlp.gate_up_proj"
    assert problem.found == (
        "parts with different schemes in one fused layer (gate_proj gptq 4-bit g32, symmetric, "
        "scales in float16, up_proj gptq 4-bit g32, symmetric, scales in bfloat16)"
    )
    assert problem.supported == "one scheme for all parts that vLLM fuses into a layer"
    assert problem.fix.endswith('or with all of them excluded by "-:regex" in dynamic')


@pytest.mark.parametrize(
    ("build", "config"), [("fp8-tensor", {}), ("awq", {"modules_to_not_convert": ["q_proj"]})]
)
def test_a_part_that_is_left_unquantized_is_one_of_its_fused_layer(
    tmp_path: Path, build: str, config: dict[str, list[str]]
) -> None:
    plain = make_plain("model.layers.0.self_attn.q_proj", 64, 64)
    write_checkpoint(tmp_path, build, config=config, edits=[plain])
    (problem,) = problems_of(tmp_path, dataclasses.replace(H200, keeps_activations=True))
    assert problem.layer == "model.layers.0.self_attn.qkv_proj"
    assert problem.found.startswith(
        f"parts with different schemes in one fused layer (q_proj unquantized, k_proj {build[:3]} "
    )


V100 = dataclasses.replace(device_by_name("a100"), name="v100", capability=(7, 0))


@pytest.mark.parametrize(
    ("target", "found", "supported"),
    [
        (Target(V100, torch.float16), "v100 of compute capability 7.0", "8.0 and newer"),
        (Target(V100, torch.float32), "activations in float32", "float16, bfloat16"),
    ],
)
def test_what_no_layer_can_run_on_is_one_problem(
    tmp_path: Path, target: Target, found: str, supported: str
) -> None:
    """At every size, beside what is wrong with a layer itself, and from a single layer too."""
    missing = "model.layers.0.mlp.up_proj.scales"
    write_checkpoint(tmp_path / "good", layers=2)
    write_checkpoint(tmp_path / "bad", layers=2, edits=[drop(missing)])
    for tp_size in (1, 2):
        problems = problems_of(tmp_path / "good", target, tp_size)
        assert {problem.layer for problem in problems} == {"device v100"}
        assert (problems[0].found, problems[0].supported) == (found, supported)
        assert len(problems) == 1 + (target.act_dtype.value == "float32")
    assert problems_of(tmp_path / "bad", target)[-1].layer == missing.removesuffix(".scales")
    layer = plan_model(read_checkpoint(tmp_path / "good"), H200).layers[0]
    formats = {fmt.module: fmt for fmt in layer.formats}
    with pytest.raises(PreflightError) as error:
        plan_layer(layer.shard, formats, target)
    assert error.value.problems == problems


def test_equal_problems_fold_over_layers() -> None:
    problems = [Problem(f"model.layers.{i}.mlp", "a", "b", "c") for i in (0, 1, 2, 5)]
    problems.append(Problem("lm_head", "a", "b", "c"))
    assert [problem.layer for problem in fold_problems(problems)] == [
        "model.layers.0-2,5.mlp (4 layers)",
        "lm_head",
    ]


def test_equal_problems_fold_over_experts_of_the_same_layers() -> None:
    def problem(layer: int, expert: int, found: str = "a") -> Problem:
        return Problem(f"model.layers.{layer}.mlp.experts.{expert}.up_proj", found, "b", "c")

    problems = [problem(layer, expert) for layer in range(3) for expert in (0, 1, 2, 3)]
    problems += [problem(3, 17), problem(4, 17, "other"), problem(5, 17)]
    assert [each.layer for each in fold_problems(problems)] == [
        "model.layers.0-2.mlp.experts.0-3.up_proj (12 layers)",
        "model.layers.3,5.mlp.experts.17.up_proj (2 layers)",
        "model.layers.4.mlp.experts.17.up_proj",
    ]
