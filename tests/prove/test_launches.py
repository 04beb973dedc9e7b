"""Every launch of a layer, compared with PyTorch: right ones pass, a wrong one names its layer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from expert_layers import Layer
from fusedq_kernels import ops, prepared, testing
from fusedq_kernels.call import Call
from fusedq_kernels.choose import tuned_file, tuning
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.own_rows import own_file
from fusedq_kernels.choose.tuned_file import TunedRow, TunedTable
from fusedq_kernels.cuda.decode import DECODERS
from fusedq_kernels.cuda.routing import Router
from fusedq_kernels.experts import ResidentExperts, Stack
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import TILED_LAYOUTS, Policy, QuantSpec, TileConfig, WeightType
from vllm_fusedq.errors import KernelError
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.uses import Use
from vllm_fusedq.prove.launches import LoadedExperts, LoadedLayer, run_launches

N, K = 72, 128
TARGET = Target(device_by_name("h200"), torch.float16)


def layer(weight_type: WeightType, has_bias: bool = True) -> LoadedLayer:
    spec = QuantSpec(weight_type, 64, torch.float32)
    logical = testing.random_logical(N, K, spec)
    packed = packing.pack(logical, TILED_LAYOUTS[weight_type], torch.float16)
    uses = tuple(
        Use.of(Call.of(packed, kernel, torch.float16), TARGET.device)
        for kernel in ("triton-gather", "triton-gemm")
    )
    return LoadedLayer("layers.3.qkv_proj", packed, uses, has_bias)


def compared(layer: LoadedLayer, max_tokens: int = 70) -> int:
    return run_launches(layer, TARGET, max_tokens, layer.truth(TARGET))


@pytest.fixture
def fresh() -> None:
    """Kernels are prepared anew, before and after."""
    prepared.prepared.cache_clear()
    yield
    prepared.prepared.cache_clear()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_right_launches_are_counted(batch_invariant: bool) -> None:
    target = replace(TARGET, policy=Policy(batch_invariant))
    fp4 = layer(WeightType.FP4)
    count = run_launches(fp4, target, 70, fp4.truth(target))
    assert count == len(list(fp4.launches(target, 70))) > 4
    assert {reached.has_bias for _, reached in fp4.launches(target, 70)} == {False, True}
    assert run_launches(fp4, target, 70) == count


def test_a_wrong_decoder_names_layer_launch_and_versions(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DECODERS, WeightType.FP4, DECODERS[WeightType.NF4])
    fp4 = layer(WeightType.FP4)
    multiplied = tuple(use for use in fp4.uses if use.kernel.name == "triton-gemm")
    with pytest.raises(KernelError) as error:
        compared(replace(fp4, uses=multiplied))
    message = str(error.value)
    assert message.startswith(
        "layers.3.qkv_proj (fp4, groups of 64, [72, 128] out_features x in_features per rank): "
        "found that triton-gemm 8x"
    )
    assert "with 1 token and no bias is wrong on h200 with Triton " in message
    assert f"Triton {triton.__version__}, activations float16: " in message
    assert " of 72 outputs wrong (the worst: token 0, output " in message
    assert "supported: what plain PyTorch computes in float64, within rounding; " in message
    assert message.endswith("and report this message")


def test_a_launch_that_is_wrong_with_a_bias_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ops.run

    def run(x, packed, bias, launch, out=None):
        y = real(x, packed, bias, launch, out=out)
        if bias is not None and len(x) >= 64:
            y[63, N - 1] += 1
        return y

    monkeypatch.setattr(ops, "run", run)
    assert compared(layer(WeightType.FP4, has_bias=False))
    with pytest.raises(KernelError, match=r"with 64 tokens and a bias is wrong .* output 71: "):
        compared(layer(WeightType.FP4))


def on_zeros(layer: LoadedLayer) -> int:
    return run_launches(layer, TARGET, 70)


@pytest.mark.parametrize("run", [compared, on_zeros])
def test_a_kernel_that_does_not_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[LoadedLayer], int]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("ptxas went away")

    monkeypatch.setattr(ops, "run", fail)
    with pytest.raises(KernelError) as error:
        run(layer(WeightType.FP4))
    assert "does not run on h200 with Triton " in str(error.value)
    assert "(RuntimeError: ptxas went away); supported: launches that compile" in str(error.value)


def test_memory_that_runs_out_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "run", run)
    with pytest.raises(torch.OutOfMemoryError):
        compared(layer(WeightType.FP4))


def test_a_models_default_dtype_does_not_blur_the_truth(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads weights with the model's dtype as torch's default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert compared(layer(WeightType.NF4), 17)
    finally:
        torch.set_default_dtype(torch.float32)


def experts(max_tokens: int | None = None) -> LoadedExperts:
    made = Layer(QuantSpec(WeightType.UINT4B8, 32, torch.float16), kernel="triton-gemm")
    resident = ResidentExperts(made.call, Stack.of(made.w13), Stack.of(made.w2), 2)
    return LoadedExperts("layers.3.mlp.experts", resident, max_tokens)


def test_launches_of_experts_are_those_of_all_ranks_tokens_under_the_targets_policy() -> None:
    few, many = (list(experts(most).launches(TARGET, 8)) for most in (None, 3000))
    assert max(reached.most for _, reached in few) == 8
    assert max(reached.most for _, reached in many) == 3000
    assert len(many) > len(few)
    invariant = replace(TARGET, policy=Policy(batch_invariant=True))
    assert all(
        "batch-invariant" in reached.launch.source
        for _, reached in experts().launches(invariant, 100)
    )


def test_a_wrong_launch_of_experts_names_both_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = experts()
    truth = layer.truth(TARGET)
    count = run_launches(layer, TARGET, 8, truth)
    assert count == len(list(layer.launches(TARGET, 8))) > 1
    assert run_launches(layer, TARGET, 8) == count
    real = Router.sum

    def adding(self, y, topk_weights, topk_ids, expert_map, out) -> None:
        real(self, y, topk_weights, topk_ids, expert_map, out)
        out[-1, -1] += 1

    monkeypatch.setattr(Router, "sum", adding)
    with pytest.raises(KernelError) as error:
        run_launches(layer, TARGET, 8, truth)
    message = str(error.value)
    assert message.startswith(
        "layers.3.mlp.experts (5 experts, w13 uint4b8, groups of 32, [96, 64] out_features x "
        "in_features per rank, w2 uint4b8, groups of 32, [64, 48] out_features x in_features per "
        "rank): found that triton-gemm 8x"
    )
    assert "with 1 token is wrong on h200 with Triton " in message

    def failing(*_: object) -> None:
        raise RuntimeError("ptxas went away")

    monkeypatch.setattr(Router, "sum", failing)
    with pytest.raises(KernelError, match=r"1 token does not run on h200 .*ptxas went away"):
        run_launches(layer, TARGET, 8)


def test_a_measured_row_of_the_user_is_named_as_the_way_out(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile = TileConfig(16, 32, 1, 4, 3)
    row = TunedRow(WeightType.FP4, 64, N, K, 64, "triton-gemm", tile, 9.0)
    table = TunedTable("h200", triton.__version__, "", "", (row,))
    path = own_file(TARGET.device, triton.__version__)
    path.parent.mkdir(parents=True)
    tuned_file.write(path, [table])
    tuning.forget()
    try:
        monkeypatch.setitem(DECODERS, WeightType.FP4, DECODERS[WeightType.NF4])
        fp4 = layer(WeightType.FP4)
        multiplied = tuple(use for use in fp4.uses if use.kernel.name == "triton-gemm")
        with pytest.raises(KernelError, match=r"\(tuned: yours, row 1\).*remove ") as error:
            compared(replace(fp4, uses=multiplied))
        assert str(error.value).endswith(
            f"remove {path}, the rows that fusedq tune wrote, and report this message"
        )
    finally:
        tuning.forget()
