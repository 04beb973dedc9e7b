"""The trace of a fused layer: the plan's kernel is seen, and every way of unpacking a weight is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile

from checkpoints import write_checkpoint
from fusedq_kernels import ops, reference
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.cuda import gemm_kernel
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import DEFAULT_POLICY, Policy
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.uses import Use
from vllm_fusedq.prove.trace import LayerTrace, judge, mark, record

TOKENS = 4
DEVICE = cpu_device()
DTYPE = torch.bfloat16
TARGET = Target(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> LayerLoader:
    """A layer of 1024 x 1536: 3 MB unpacked, many times what four tokens need."""
    path = tmp_path_factory.mktemp("trace")
    write_checkpoint(path, "awq", hidden=1536, intermediate=1024, group_size=128)
    plans = plan_model(read_checkpoint(path), TARGET).layers
    plan = next(plan for plan in plans if plan.prefix.endswith("down_proj"))
    loader = LayerLoader.create(plan, DTYPE, torch.device("cpu"))
    with safe_open(path / "model.safetensors", "pt") as file:
        for stored in plan.formats[0].tensors:
            loader.add(stored.name, file.get_tensor(f"{plan.prefix}.{stored.name}"))
    return loader


def trace(loader: LayerLoader, call: Callable[[torch.Tensor], object]) -> LayerTrace:
    x = torch.ones(TOKENS, loader.plan.k, dtype=DTYPE)
    with (
        profile(
            activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
        ) as found,
        record(loader.plan.prefix),
    ):
        call(x)
    return judge(loader.plan, loader.plan.main, loader.packed, found.events(), TOKENS)


def fused(loader: LayerLoader, x: torch.Tensor) -> torch.Tensor:
    return ops.matmul(x, loader.packed, None, "cpu-fused")


def test_a_fused_layer_is_proven(loader: LayerLoader) -> None:
    found = trace(loader, lambda x: fused(loader, x))
    assert found.problems == ()
    assert found.calls == 1
    assert found.kernels == (f"fusedq_cpu::{this_isa().operator}",)
    assert found.dequantized == 2 * 1536 * 1024
    assert 0 < found.largest <= found.allowed < found.dequantized / 16


def dequantized(loader: LayerLoader, x: torch.Tensor) -> torch.Tensor:
    return x @ reference.dequantize(unpack(loader.packed)).to(DTYPE).t()


def cast(loader: LayerLoader, x: torch.Tensor) -> torch.Tensor:
    loader.packed.scales.to(torch.float32)
    return fused(loader, x)


def twice(loader: LayerLoader, x: torch.Tensor) -> torch.Tensor:
    return fused(loader, x) + fused(loader, x)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (dequantized, "0 fused operators in one call"),
        (dequantized, "no fusedq_cpu:: in a call"),
        (dequantized, "an allocation of 6291456 bytes, where activations and workspace explain "),
        (cast, "aten::_to_copy of a resident tensor"),
        (twice, "2 fused operators in one call"),
    ],
)
def test_what_is_not_fused_is_seen(
    loader: LayerLoader, call: Callable[..., Any], problem: str
) -> None:
    found = trace(loader, lambda x: call(loader, x))
    assert any(problem in each for each in found.problems), found.problems


def test_a_layer_that_never_ran_is_seen(loader: LayerLoader) -> None:
    found = judge(loader.plan, loader.plan.main, loader.packed, [], TOKENS)
    assert found.problems == ("the layer never ran",)


def gpu_event(
    name: str, *children: Any, kernels: tuple[str, ...] = (), allocated: int = 0
) -> SimpleNamespace:
    """An event as the profiler gives it of a GPU."""
    return SimpleNamespace(
        name=name,
        cpu_children=children,
        kernels=[SimpleNamespace(name=kernel) for kernel in kernels],
        input_shapes=[],
        self_cpu_memory_usage=0,
        self_device_memory_usage=allocated,
    )


def on_h200(plan: LayerPlan, policy: Policy = DEFAULT_POLICY) -> Use:
    """What is done with the plan's weight on an H200."""
    formats = {fmt.module: fmt for fmt in plan.formats}
    target = Target(device_by_name("h200"), DTYPE, policy=policy)
    return plan_layer(plan.shard, formats, target).main


@pytest.mark.parametrize(
    ("kernel", "problems"),
    [
        (gemm_kernel.fused_gemm_kernel.__name__, ()),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", ("no fused_gemm_kernel in a call",)),
    ],
)
def test_only_the_fused_kernel_is_evidence_on_a_gpu(
    loader: LayerLoader, kernel: str, problems: tuple[str, ...]
) -> None:
    plan = loader.plan
    operator = gpu_event("fusedq::matmul_out", kernels=(kernel,))
    call = gpu_event(mark(plan.name), operator)
    found = judge(plan, on_h200(plan), loader.packed, [call], TOKENS)
    assert found.problems == problems


@pytest.mark.parametrize(("batch_invariant", "tokens"), [(False, 64), (True, 65)])
def test_the_budget_is_that_of_the_launch_that_runs(
    loader: LayerLoader, batch_invariant: bool, tokens: int
) -> None:
    """By hand: K in 2 parts is 2 x 64 x 1536 fp32 partial sums. Batch-invariant launches of more
    than 64 tokens keep them in registers and have no such excuse."""
    plan = loader.plan
    kernels = (gemm_kernel.fused_gemm_kernel.__name__,)
    sums = gpu_event("aten::empty", allocated=4 * 2 * 64 * 1536)
    call = gpu_event(mark(plan.name), gpu_event("fusedq::matmul_out", sums, kernels=kernels))
    found = judge(plan, on_h200(plan, Policy(batch_invariant)), loader.packed, [call], tokens)
    assert bool(found.problems) == batch_invariant
    parts = 0 if batch_invariant else 4 * 2 * tokens * 1536
    assert found.allowed - (1 << 16) == max(parts, 2 * tokens * 1536)
