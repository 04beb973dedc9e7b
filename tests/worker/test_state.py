"""The live report: what was loaded and what it took, and every launch warmed up."""

import json
import logging
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import jsonschema
import pytest
import torch
from safetensors import safe_open

from checkpoints import write_checkpoint
from expert_layers import Layer
from fusedq_kernels import warmup
from fusedq_kernels.call import Call
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.experts import ResidentExperts, Stack
from fusedq_kernels.layouts.packing import empty_packed
from fusedq_kernels.types import TILED_LAYOUTS, QuantSpec, WeightType
from mixtures import HIDDEN, write_mixture
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.uses import Use
from vllm_fusedq.prove.launches import LoadedExperts, LoadedLayer
from vllm_fusedq.report.document import write_document
from vllm_fusedq.settings import Settings
from vllm_fusedq.worker.state import WorkerRank, WorkerState
from vllm_fusedq.worker.warmup import compile_ahead, warm_up

PLAN_SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "plan.v1.json"
STRIPED = Target(cpu_device(), torch.bfloat16, "cpu-striped")


def loaded(path: Path, target: Target, **settings: str) -> WorkerState:
    """A worker that has loaded all layers of the checkpoint in `path`, for real."""
    plan = plan_model(read_checkpoint(path), target)
    state = WorkerState(
        *(target, Settings(**settings)),
        model="some/model",
        max_tokens=64,
        vllm_version="0.32.0",
        unquantized=plan.unquantized,
    )
    load_all(state, path)
    return state


def load_all(state: WorkerState, path: Path) -> None:
    """Create and load all layers of the checkpoint in `path`, for real."""
    plans = plan_model(read_checkpoint(path), state.target).layers
    state.plans.extend(plans)
    with safe_open(path / "model.safetensors", "pt") as file:
        for plan in plans:
            loader = LayerLoader.create(plan, state.target.act_dtype, torch.device("cpu"))
            for part, fmt in zip(plan.shard.parts, plan.formats, strict=True):
                for stored in fmt.tensors:
                    tensor = file.get_tensor(f"{part.module}.{stored.name}")
                    loader.add(stored.name, tensor, part.shard_id)
            state.layer_loaded(loader, has_bias="qkv" in plan.prefix)


def test_seconds_and_bytes_are_told_apart(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", layers=2)
    state = loaded(tmp_path, STRIPED, report=str(tmp_path / "plan.json"))
    document = state.document()
    assert json.loads((tmp_path / "plan.json").read_text()) == document
    jsonschema.validate(document, json.loads(PLAN_SCHEMA.read_text()))
    stored = read_checkpoint(tmp_path).tensors
    quantized = [info for name, info in stored.items() if "_proj." in name]
    assert document["loading"]["bytes"] == sum(info.nbytes for info in quantized)
    assert document["repacking"]["bytes"] == sum(
        loader.packed.qweight.nbytes + loader.packed.scales.nbytes for loader in state.loaders
    )
    # Four kinds of layers, one launch each, and qkv_proj a second time with its bias
    assert document["warm_up"]["launches"] == 5
    assert document["repacking"]["seconds"] > 0
    assert document["warm_up"]["seconds"] > 0
    assert state.load_seconds > 0


def test_layers_that_are_created_later_are_warmed_up_alone(tmp_path: Path) -> None:
    """Multi-token prediction: a block like those of the model adds no launch, others add theirs."""
    write_checkpoint(tmp_path / "model", "awq", layers=2)
    write_checkpoint(tmp_path / "more", "awq", intermediate=128)
    state = loaded(tmp_path / "model", STRIPED)
    launches, seconds, loading = state.warmed.launches, state.warmed.seconds, state.load_seconds
    for added, folder in ((0, "model"), (2, "more")):
        load_all(state, tmp_path / folder)
        assert state.warmed.launches == launches + added
    assert state.warmed.seconds > seconds
    assert state.load_seconds > loading
    elapsed = time.perf_counter() - state.started
    assert elapsed >= state.load_seconds + state.pack_seconds + seconds


def test_the_log_names_the_plan_and_the_three_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, "awq")
    with caplog.at_level(logging.INFO, "vllm.fusedq"):
        state = loaded(tmp_path, STRIPED)
    plan, steps = caplog.messages
    assert "model.layers.0.mlp.down_proj" in plan
    assert "fused: 4 (4 x cpu-striped)" in plan
    assert f"{state.stored_bytes / 1e6:.1f} MB read; repacking: " in steps
    assert f"{state.resident_bytes / 1e6:.1f} MB resident; warm-up: " in steps
    assert steps.endswith("5 launches, 0 of them compared with PyTorch")


def test_one_worker_speaks_for_each_stage() -> None:
    ranks = [WorkerRank(tensor, 2, stage, 2, data) for tensor, stage, data in CELLS]
    files = [rank.report_file(Path("out/plan.json")) for rank in ranks if rank.reports]
    assert files == [Path("out/plan.json"), Path("out/plan.stage1.json")]


CELLS = [(tensor, stage, data) for data in (0, 1) for stage in (0, 1) for tensor in (0, 1)]


def test_the_interpreter_compiles_nothing(tmp_path: Path) -> None:
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    form = TILED_LAYOUTS[spec.weight_type]
    packed = empty_packed(form, 128, 128, spec, 0, torch.float16, "cpu")
    target = Target(device_by_name("sm_90"), torch.float16)
    use = Use.of(Call.of(packed, "triton-gemm", torch.float16), target.device)
    layer = LoadedLayer("x", packed, (use,), has_bias=False)
    assert warm_up([layer], target, 64).launches == 0


def test_a_document_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    write_document(target, {"a": 1})
    assert json.loads(target.read_text()) == {"a": 1}
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    with pytest.raises(TypeError):
        write_document(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


class Compiler:
    """Stands for `AheadCompiler`: keeps what it was given."""

    made: ClassVar[list["Compiler"]] = []
    cache = Path("some/cache")

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self.work, self.device, self.waited = work, device, 0
        self.made.append(self)

    def wait(self) -> None:
        self.waited += 1


def test_the_first_weight_compiles_each_kind_of_layer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedq_kernels.cuda import ahead

    monkeypatch.setattr(ahead, "AheadCompiler", Compiler)
    monkeypatch.setattr(Compiler, "made", [])
    write_checkpoint(tmp_path, "awq", layers=2)
    target = Target(device_by_name("h200"), torch.float16)
    state = WorkerState(target, Settings(), max_tokens=20)
    biased: list[str] = []
    plans = plan_model(read_checkpoint(tmp_path), target).layers
    for plan in plans:
        state.layer_created(plan, lambda plan=plan: plan.prefix in biased)
    assert state.plans == list(plans)
    # A layer's bias is registered after its weights
    biased.extend(plan.prefix for plan in plans if "qkv" in plan.prefix)
    device = torch.device("cuda", 1)
    for _ in range(3):
        state.weight_arrives(device)
    (compiler,) = Compiler.made
    assert compiler.device == device
    compiled = []
    monkeypatch.setattr(
        warmup,
        "run_once",
        lambda reached, kernel, packed, dtype: compiled.append((reached, packed)),
    )
    compiler.work()
    assert {packed.qweight.device.type for _, packed in compiled} == {"meta"}
    # Four kinds of layers in two blocks
    assert len({id(packed) for _, packed in compiled}) == 4
    assert {packed.n for reached, packed in compiled if reached.has_bias} == {
        plan.n for plan in plans if "qkv" in plan.prefix
    }
    # Blocks of multi-token prediction come later
    state.layer_created(plans[0], lambda: False)
    state.weight_arrives(device)
    assert len(Compiler.made) == 2


def test_the_first_weight_compiles_experts_by_both_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedq_kernels.cuda import ahead

    monkeypatch.setattr(ahead, "AheadCompiler", Compiler)
    monkeypatch.setattr(Compiler, "made", [])
    write_mixture(tmp_path, layers=2)
    target = Target(device_by_name("h200"), torch.float16)
    state = WorkerState(target, Settings(), max_tokens=20)
    for plan in plan_model(read_checkpoint(tmp_path), target).layers:
        state.layer_created(plan, lambda: False)
    made = Layer(QuantSpec(WeightType.UINT4B8, 32, torch.float16), kernel="triton-gemm")
    stacks = Stack.of(made.w13), Stack.of(made.w2)
    for layer, tokens in ((0, 20), (1, 20), (2, 900)):
        resident = ResidentExperts(made.call, *stacks, 2)
        state.experts_created(LoadedExperts(f"layers.{layer}.mlp.experts", resident, tokens))
    compiled, dense = [], []
    monkeypatch.setattr(
        warmup, "run_experts_once", lambda reached, resident: compiled.append((reached, resident))
    )
    monkeypatch.setattr(
        warmup, "run_once", lambda reached, kernel, packed, dtype: dense.append(packed.n)
    )
    state.weight_arrives(torch.device("cuda", 1))
    Compiler.made[0].work()
    assert {resident.w2.scales.device.type for _, resident in compiled} == {"meta"}
    # Two kinds: of 20 tokens and of 900
    assert len({id(resident.w13.qweight) for _, resident in compiled}) == 2
    assert max(reached.most for reached, _ in compiled) == 900
    # Of the other layers o_proj alone
    assert set(dense) == {HIDDEN}


def test_on_a_cpu_nothing_is_compiled(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq")
    plans = [(plan, False) for plan in plan_model(read_checkpoint(tmp_path), STRIPED).layers]
    assert compile_ahead(plans, (), STRIPED, 64, torch.device("cpu")) is None


@pytest.mark.parametrize("check", [True, False])
def test_the_warm_up_waits_for_the_compiler_and_compares_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    """The CPU's kernel stands for a GPU's, which is never without Triton."""
    from vllm_fusedq.worker import warmup as worker_warmup

    monkeypatch.setattr(worker_warmup, "on_gpu", lambda packed: True)
    compared = []

    def run(layer: LoadedLayer, target: Target, max_tokens: int, truth: object) -> int:
        compared.append((layer.name, truth is not None))
        return 3

    monkeypatch.setattr(worker_warmup, "run_launches", run)
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    packed = empty_packed(TILED_LAYOUTS[spec.weight_type], 128, 128, spec, 0, torch.float16, "cpu")
    use = Use.of(Call.of(packed, "cpu-striped", torch.float16), STRIPED.device)
    layers = [LoadedLayer(name, packed, (use,), has_bias=False) for name in ("a", "b")]
    compiler = Compiler(lambda: None, torch.device("cuda"))
    warmed = warm_up(layers, STRIPED, 64, check=check, ahead=[compiler])
    assert compiler.waited == 1
    assert compared == [("a", check)]
    assert (warmed.launches, warmed.checked, warmed.cache) == (3, 3 * check, "some/cache")
