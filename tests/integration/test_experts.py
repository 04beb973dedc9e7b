"""vLLM's layer of experts with our method: one verdict, its loaders, its answers, its refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fusedq_kernels import reference, testing
from fusedq_kernels.activation import PLAIN, SILU, Activation
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.choose.experts import Load, select
from fusedq_kernels.cpu.activations import activated
from fusedq_kernels.layouts import stacked
from fusedq_kernels.types import LogicalWeight, QuantSpec, WeightType
from mixtures import COUNT, HIDDEN, INNER, Mixture, write_mixture
from vllm_configs import current_config
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats import format_for
from vllm_fusedq.plan.experts import ExpertSplit
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.prove.launches import LoadedExperts
from vllm_fusedq.settings import Settings

STACK = "model.layers.0.mlp.experts"
TARGET = Target(cpu_device(), torch.float16)
NAMES = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}

Make = Callable[..., torch.nn.Module]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds vLLM's layer of experts of a checkpoint, on one rank of many."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    from vllm_fusedq.integration.config import FusedQConfig
    from vllm_fusedq.worker.state import WorkerState

    def build(
        checkpoint: Checkpoint,
        rank: int = 0,
        ranks: int = 1,
        spread: bool = False,
        parallel: dict[str, Any] | None = None,
        lora: object = None,
        target: Target = TARGET,
        **layer: Any,
    ) -> torch.nn.Module:
        group = SimpleNamespace(rank_in_group=rank, world_size=ranks)
        alone = SimpleNamespace(rank_in_group=0, world_size=1)
        for name, each in (("_TP", group), ("_EP", group), ("_DP", alone), ("_PCP", alone)):
            monkeypatch.setattr(parallel_state, name, each)
        config = FusedQConfig()
        config.format = format_for(checkpoint)
        config.worker = WorkerState(target, Settings(), max_tokens=100)
        sizes = {"num_experts": COUNT, "hidden_size": HIDDEN, "intermediate_size": INNER}
        with current_config():
            vllm_config = get_current_vllm_config()
            monkeypatch.setattr(vllm_config, "lora_config", lora)
            for name, value in {"enable_expert_parallel": spread, **(parallel or {})}.items():
                monkeypatch.setattr(vllm_config.parallel_config, name, value)
            runner = FusedMoEFactory(
                **{**sizes, "top_k": 2, "prefix": STACK, **layer}, quant_config=config
            )
        return runner.routed_experts

    return build


def load(layer: torch.nn.Module, path: Path) -> None:
    """As RoutedExperts.load_weights calls the loaders, by keyword."""
    with safe_open(path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(f"{STACK}."):
                number, module, suffix = name.removeprefix(f"{STACK}.").split(".", 2)
                weight, part = NAMES[module]
                param = getattr(layer, f"{weight}_{suffix}")
                taken = param.weight_loader(
                    param=param,
                    loaded_weight=file.get_tensor(name),
                    weight_name=f"{STACK}.{weight}_{suffix}",
                    shard_id=part,
                    expert_id=int(number),
                    return_success=True,
                )
                place = layer.expert_map_manager.map_global_to_local(int(number))
                assert taken == (place >= 0)


def truth(mixture: Mixture, number: int) -> reference.Expert:
    """Gate, up and down of a symmetric or an asymmetric 4-bit expert, for the oracle."""
    spec = QuantSpec(WeightType.UINT4, 32, torch.float16)
    return reference.Expert(
        *(
            LogicalWeight(
                torch.from_numpy(each.codes), each.scales, torch.from_numpy(each.zeros), spec
            )
            for each in mixture.expert(number)
        )
    )


@pytest.mark.parametrize(("ranks", "spread"), [(1, False), (2, False), (2, True)])
def test_ranks_plan_as_the_headers_say_and_add_up_to_the_experts(
    tmp_path: Path, make: Make, ranks: int, spread: bool
) -> None:
    mixture = write_mixture(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((9, HIDDEN), generator=generator).half()
    ids = torch.rand((9, COUNT), generator=generator).argsort(1)[:, :2].int()
    weights = torch.rand((9, 2), generator=generator)
    total = torch.zeros(9, HIDDEN)
    for rank in range(ranks):
        layer = make(checkpoint, rank, ranks, spread)
        split = ExpertSplit(parallel=spread)
        here = plan_model(checkpoint, TARGET, ranks, ranks=[rank], split=split).layers
        there = [loader.plan for loader in layer.fusedq_loaders]
        assert [plan for plan in here if plan.prefix == STACK] == there
        load(layer, tmp_path)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.forward_modular(x, weights, ids).float()
    truths = {number: truth(mixture, number) for number in range(COUNT)}
    expected = reference.experts(x, weights, ids, truths)
    testing.assert_close(total, expected, 8e-3, 2e-3)


@pytest.mark.parametrize(("ranks", "spread"), [(1, False), (2, False), (2, True)])
def test_on_a_gpu_what_will_be_launched_is_warmed_up_and_compared(
    tmp_path: Path,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    spread: bool,
) -> None:
    """Tensors of a CPU stand for those of a GPU: what would run there is listed, nothing runs."""
    from vllm_fusedq.worker import warmup

    write_mixture(tmp_path)
    checkpoint, target = read_checkpoint(tmp_path), replace(TARGET, device=device_by_name("h200"))
    layer = make(checkpoint, ranks - 1, ranks, spread, target=target, top_k=3)
    assert {loader.plan.main.kernel.name for loader in layer.fusedq_loaders} == {"triton-gemm"}
    state = layer.quant_method.state
    loaded = state.experts[STACK]
    places = COUNT if spread else None
    assert (loaded.resident.top_k, loaded.resident.places, loaded.max_tokens) == (3, places, 100)
    assert loaded.resident.call.text == layer.quant_method.call
    # Launches are those of the three that vLLM asks, whatever the config says
    assert layer.fusedq_loaders[0].plan.main.together.top_k == 3
    compared = []

    def run(layer: object, target: Target, max_tokens: int, truth: object) -> int:
        compared.append((layer, [reached for _, reached in layer.launches(target, max_tokens)]))
        assert truth is layer
        return len(compared[-1][1])

    monkeypatch.setattr(warmup, "run_launches", run)
    monkeypatch.setattr(warmup, "on_gpu", lambda packed: True)
    monkeypatch.setattr(LoadedExperts, "truth", lambda self, target: self)
    here = property(lambda self: (SimpleNamespace(device="cpu"),))
    monkeypatch.setattr(LoadedExperts, "kernels", here)
    load(layer, tmp_path)
    layer.quant_method.process_weights_after_loading(layer)
    ((known, launches),) = compared
    assert known is loaded
    assert state.warmed.checked == state.warmed.launches == len(launches) > 1
    # Every number of tokens is served by a launch that was compared
    for tokens in range(1, 101):
        load_of = Load(tokens, 3, COUNT)
        chosen = select(loaded.resident.call, load_of, target.device)
        assert any(
            (each.launch.up, each.launch.down) == (chosen.up, chosen.down)
            and each.tokens <= tokens <= each.most
            for each in launches
        ), tokens
    assert loaded.resident.w13.qweight is layer.fusedq_w13_qweight
    assert loaded.resident.w2.scales is layer.fusedq_w2_scales


def test_experts_get_the_tokens_of_all_copies() -> None:
    from vllm_fusedq.integration.experts import gathered_tokens

    sizes = {"dp_size": 2, "pcp_size": 1, "sp_size": 4}
    assert gathered_tokens(SimpleNamespace(**sizes), 101) == 2 * 104
    assert gathered_tokens(SimpleNamespace(dp_size=1), 101) == 101


def test_loaders_take_what_hand_written_loops_give(tmp_path: Path, make: Make) -> None:
    """DeepSeek's and Llama 4's loops pass the first three arguments by place."""
    write_mixture(tmp_path)
    layer = make(read_checkpoint(tmp_path), 1, 2, spread=True)
    param, words = layer.w13_scales, torch.ones(2, INNER, dtype=torch.float16)
    loader = param.weight_loader
    assert loader.supports_moe_loading
    assert loader(param, words, "w", shard_id="w1", expert_id=0, return_success=True) is False
    assert loader(param, words, "w", shard_id="w1", expert_id=3, return_success=True) is True
    assert loader(param, words, "w", shard_id="w3", expert_id=2) is None
    meta = torch.nn.Parameter(torch.empty(1, dtype=torch.float16, device="meta"), False)
    assert loader(meta, words, "w", shard_id="w3", expert_id=2, return_success=True) is True
    with pytest.raises(WeightLoadError, match=f"{STACK}.w13: 10 tensors were never loaded"):
        layer.quant_method.process_weights_after_loading(layer)


def test_every_checkpoint_tensor_has_a_parameter_and_no_other(tmp_path: Path, make: Make) -> None:
    """vLLM refuses to serve a parameter that no tensor reached."""
    write_mixture(tmp_path, "bnb-nf4")
    layer = make(read_checkpoint(tmp_path))
    suffixes = {
        *("weight", "weight_absmax", "weight_quant_map"),
        "weight_quant_state_bitsandbytes__nf4",
    }
    names = {name for name, _ in layer.named_parameters()}
    assert names == {f"{weight}_{suffix}" for weight in ("w13", "w2") for suffix in suffixes}


def test_experts_that_are_left_unquantized_are_vllms(tmp_path: Path, make: Make) -> None:
    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{STACK}.")]:
            tensors.pop(name)
        for number in range(COUNT):
            for name in NAMES:
                size = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
                weight = torch.zeros(size, dtype=torch.float16)
                tensors[f"{STACK}.{number}.{name}.weight"] = weight

    write_mixture(tmp_path, config={"modules_to_not_convert": ["experts"]}, edits=[plain])
    layer = make(read_checkpoint(tmp_path), params_dtype=torch.float16)
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"


SIZES = r"4 experts of \[96, 64\] in the checkpoint; supported: 4 of \[192, 64\], which the model"
DATA = {"data_parallel_size": 2, "all2all_backend": "deepep_high_throughput"}
REFUSED = {
    "eplb": ({"parallel": {"enable_eplb": True}}, "--enable-eplb; supported: experts that stay"),
    "lora": ({"lora": object()}, "--enable-lora on quantized experts; supported: LoRA on models"),
    "all2all": (
        {"spread": True, "parallel": DATA},
        "--all2all-backend deepep_high_throughput; supported: allgather_reducescatter",
    ),
    "sizes": ({"intermediate_size": 192}, SIZES),
    "activation": ({"activation": "swigluoai"}, "experts with the activation swigluoai; supported"),
    "bias": ({"has_bias": True}, "experts without the biases that the model has; supported: bia"),
    "weighted input": (
        {"apply_router_weight_on_input": True},
        "2 experts of a token, weighted by the router on their input; supported: one such",
    ),
}


def test_experts_on_a_cpu_need_vllms_router_there(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_fusedq.integration import experts

    write_mixture(tmp_path)
    monkeypatch.setattr(experts, "installed_vllm", lambda: (0, 29))
    monkeypatch.setattr(experts.current_platform, "is_cpu", lambda: True)
    message = "experts on a CPU in vLLM 0.29; supported: vLLM 0.30 and newer"
    with pytest.raises(PreflightError, match=message):
        make(read_checkpoint(tmp_path))


def test_a_router_may_weigh_the_input_of_a_single_expert(tmp_path: Path, make: Make) -> None:
    mixture = write_mixture(tmp_path)
    layer = make(read_checkpoint(tmp_path), apply_router_weight_on_input=True, top_k=1)
    load(layer, tmp_path)
    layer.quant_method.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, HIDDEN), generator=generator).half()
    ids, weights = torch.tensor([[0], [3], [2], [1], [3]]), torch.rand((5, 1), generator=generator)
    truths = {number: truth(mixture, number) for number in range(COUNT)}
    weighted = x * weights.half()
    expected = reference.experts(weighted, torch.ones(5, 1), ids, truths)
    testing.assert_close(layer.forward_modular(x, weights, ids), expected, 8e-3, 2e-3)


@pytest.mark.parametrize(("ranks", "spread"), [(1, False), (2, False), (2, True)])
def test_biases_are_added_once(tmp_path: Path, make: Make, ranks: int, spread: bool) -> None:
    """Also those of GPTQ's older tools, of which a model knows nothing."""
    generator = torch.Generator().manual_seed(5)
    biases = {
        f"{STACK}.{number}.{name}.bias": torch.randn(
            HIDDEN if name == "down_proj" else INNER, generator=generator
        ).half()
        for number in range(COUNT)
        for name in NAMES
    }
    mixture = write_mixture(tmp_path, edits=[lambda tensors: tensors.update(biases)])
    x = torch.randn((7, HIDDEN), generator=generator).half()
    ids = torch.rand((7, COUNT), generator=generator).argsort(1)[:, :2].int()
    weights = torch.rand((7, 2), generator=generator)
    total = torch.zeros(7, HIDDEN)
    for rank in range(ranks):
        layer = make(read_checkpoint(tmp_path), rank, ranks, spread)
        load(layer, tmp_path)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.forward_modular(x, weights, ids).float()
    expected = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for number in range(COUNT):
        gate, up, down = truth(mixture, number)
        b = [biases[f"{STACK}.{number}.{name}.bias"] for name in NAMES]
        hidden = reference.activate(
            SILU, reference.matmul(x, gate, b[0]), reference.matmul(x, up, b[1])
        )
        y = reference.matmul(hidden.half(), down, b[2])
        expected += ((ids == number) * weights).sum(1, keepdim=True).double() * y
    testing.assert_close(total, expected, 1e-2, 3e-3)


CURVES = {
    "silu": ("SiluAndMul", {}, {}),
    "gelu": ("GeluAndMul", {}, {}),
    "gelu_tanh": ("GeluAndMul", {}, {"approximate": "tanh"}),
    "swiglustep": ("SwigluStepAndMul", {}, {}),
    "situ": (
        "SituAndMul",
        {"activation_situ_beta": 1.5, "activation_situ_linear_beta": 2.0},
        {"beta": 1.5, "linear_beta": 2.0},
    ),
    "silu, clamped": (
        "SiluAndMulWithClamp",
        {"swiglu_limit": 0.7},
        {"swiglu_limit": 0.7, "alpha": 1.0, "beta": 0.0},
    ),
    "swigluoai_uninterleave": (
        "SiluAndMulWithClamp",
        {"swiglu_limit": 0.7, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        {"swiglu_limit": 0.7, "alpha": 1.702, "beta": 1.0},
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_activations_are_vllms(name: str) -> None:
    """Against the plain PyTorch of vLLM's own layers."""
    from vllm.model_executor.layers import activation as layers

    from vllm_fusedq.integration.activations import activation_of

    kind, options, arguments = CURVES[name]
    value = SimpleNamespace(value=name.partition(",")[0])
    activation = activation_of(SimpleNamespace(activation=value, **options))
    sums = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 4
    with current_config():
        expected = getattr(layers, kind)(**arguments).forward_native(sums)
    gate, up = sums.chunk(2, dim=1)
    alternating = stacked.alternate(gate.T, up.T).T
    torch.testing.assert_close(activated(activation, alternating), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_activations_are_vllms(name: str) -> None:
    from vllm.model_executor.layers.fused_moe.activation import (
        MoEActivation,
        apply_moe_activation,
    )

    from vllm_fusedq.integration.activations import activation_of

    value = MoEActivation(name)
    assert not value.is_gated
    sums = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.empty_like(sums)
    apply_moe_activation(value, expected, sums)
    activation = activation_of(SimpleNamespace(activation=value))
    torch.testing.assert_close(activated(activation, sums), expected)


def test_experts_without_gates_load_as_w1_and_run(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Nemotron's, of which vLLM itself runs none on a CPU."""
    from vllm.model_executor.layers.fused_moe import config as layer_config

    def two_matrices(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".gate_proj." in name]:
            del tensors[name]

    mixture = write_mixture(tmp_path, edits=[two_matrices])
    with pytest.raises(PreflightError, match="experts without gates in the checkpoint; supported"):
        make(read_checkpoint(tmp_path))
    monkeypatch.setattr(type(layer_config.current_platform), "is_cuda_alike", lambda self: True)
    names = {"up_proj": ("w13", "w1"), "down_proj": ("w2", "w2")}
    monkeypatch.setitem(globals(), "NAMES", names)
    named = {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None)}
    layer = make(read_checkpoint(tmp_path), **named)
    load(layer, tmp_path)
    layer.quant_method.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, HIDDEN), generator=generator).half()
    ids, weights = torch.tensor([[0, 1], [3, 2], [2, 1], [1, 0], [3, 1]]), torch.rand((5, 2))
    truths = {number: truth(mixture, number) for number in range(COUNT)}
    both = {number: each._replace(gate=each.up) for number, each in truths.items()}
    expected = reference.experts(x, weights, ids, both, Activation("relu2_no_mul"))
    testing.assert_close(layer.forward_modular(x, weights, ids), expected, 8e-3, 2e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_these_experts_do_not_follow_is_refused(tmp_path: Path, make: Make, name: str) -> None:
    write_mixture(tmp_path)
    options, message = REFUSED[name]
    with pytest.raises(PreflightError, match=f"{STACK}: found {message}"):
        make(read_checkpoint(tmp_path), **options)
