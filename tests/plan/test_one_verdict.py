"""`fusedq check` and the engine plan alike: headers on one side, vLLM's own layers on the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints import Tensors, write_checkpoint
from fusedq_kernels.choose.device import cpu_device, device_by_name
from published import FORMATS, QUANTIZED_HEADS, Model, write_headers
from random_models import falcon_config, falcon_h1_config, write_random_model
from vllm_configs import current_config
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats import format_for
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.shards import ParallelStyle
from vllm_fusedq.settings import Settings

# At TP 2 and 4 a rank of "straddle" begins inside a group of 128; "grouped" replicates key and
# value heads at TP 4. A vocabulary of 1000 is padded.
SHAPES = {
    "even": Model(256, 512, 2, 8, 8, head_dim=32, vocab=1000),
    "straddle": Model(256, 896, 1, 8, 4, head_dim=32, vocab=1000),
    "grouped": Model(512, 1024, 1, 8, 2, head_dim=64, vocab=1000),
}
GROUPS = {"even": 32, "straddle": 128, "grouped": 64}
DEVICES = ("a100", "l40s", "h200", "b200", "rtx5090")
TARGETS = {
    "cpu": Target(cpu_device(), torch.bfloat16),
    **{name: Target(device_by_name(name), torch.bfloat16) for name in DEVICES},
}


@pytest.fixture
def rank_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes vLLM's layers believe that they are one rank of many."""
    from vllm.distributed import parallel_state

    def become(rank: int, size: int) -> None:
        group = SimpleNamespace(rank_in_group=rank, world_size=size)
        monkeypatch.setattr(parallel_state, "_TP", group)

    return become


@contextmanager
def building() -> Iterator[None]:
    with current_config(), torch.device("meta"):
        yield


def config_for(checkpoint: Checkpoint, target: Target) -> Any:
    """vLLM's quantization config in a worker."""
    from vllm_fusedq.integration.config import FusedQConfig
    from vllm_fusedq.worker.state import WorkerState

    config = FusedQConfig()
    config.format = format_for(checkpoint)
    config.worker = WorkerState(target, Settings())
    return config


def engine_plans(checkpoint: Checkpoint, model: Model, target: Target) -> list[LayerPlan]:
    """The plans that vLLM's layers make when they are created on the current rank."""
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.llama import LlamaForCausalLM

    config = config_for(checkpoint, target)
    config.packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
    common = {"bias": False, "quant_config": config, "params_dtype": target.act_dtype.torch}
    for index in range(model.layers):
        block = f"model.layers.{index}"
        QKVParallelLinear(
            *(model.hidden, model.head_dim, model.heads, model.kv_heads),
            prefix=f"{block}.self_attn.qkv_proj",
            **common,
        )
        features = model.heads * model.head_dim
        RowParallelLinear(features, model.hidden, prefix=f"{block}.self_attn.o_proj", **common)
        pair = [model.intermediate] * 2
        gate_up = f"{block}.mlp.gate_up_proj"
        MergedColumnParallelLinear(model.hidden, pair, prefix=gate_up, **common)
        down = f"{block}.mlp.down_proj"
        RowParallelLinear(model.intermediate, model.hidden, prefix=down, **common)
    ParallelLMHead(model.vocab, model.hidden, prefix="lm_head", **common)
    return config.worker.plans


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_headers_and_layers_give_equal_plans(
    tmp_path: Path, rank_of: Callable[[int, int], None], fmt: str, shape: str
) -> None:
    model = SHAPES[shape]
    write_headers(tmp_path, model, fmt, GROUPS[shape])
    checkpoint = read_checkpoint(tmp_path)
    compared = 0
    with building():
        for target in TARGETS.values():
            for tp in (1, 2, 4):
                for rank in range(tp):
                    rank_of(rank, tp)
                    here = plan_model(checkpoint, target, tp, ranks=[rank]).layers
                    there = engine_plans(checkpoint, model, target)
                    assert {plan.prefix: plan for plan in here} == {
                        plan.prefix: plan for plan in there
                    }
                    compared += len(there)
    layers = 4 * model.layers + (fmt in QUANTIZED_HEADS)
    assert compared == len(TARGETS) * 7 * layers


@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_headers_and_layers_refuse_alike(
    tmp_path: Path, rank_of: Callable[[int, int], None], device: str
) -> None:
    """96 in_features at TP 4 are 24 per rank: no kernel takes them."""
    model = Model(64, 96, 1, 4, 4, head_dim=16, vocab=64)
    write_headers(tmp_path, model, "gptq", 32)
    checkpoint = read_checkpoint(tmp_path)
    target = TARGETS[device]
    rank_of(3, 4)
    with pytest.raises(PreflightError) as here:
        plan_model(checkpoint, target, 4)
    with building(), pytest.raises(PreflightError) as there:
        engine_plans(checkpoint, model, target)
    said = [(problem.found, problem.supported) for problem in there.value.problems]
    assert said == [("24 in_features per rank", "multiples of 16")]
    assert [(p.found, p.supported) for p in here.value.problems] == said
    assert [p.layer for p in here.value.problems] == [p.layer for p in there.value.problems]


def test_a_layer_that_vllm_replicates_is_whole_on_every_rank(
    tmp_path: Path, rank_of: Callable[[int, int], None]
) -> None:
    """Of all layers it alone has the size and rank of all ranks, and is not cut (MiniCPM3)."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    model = SHAPES["even"]
    write_headers(tmp_path, model, "gptq", GROUPS["even"])
    config = config_for(read_checkpoint(tmp_path), TARGETS["cpu"])
    rank_of(1, 2)
    with building():
        ReplicatedLinear(
            *(model.hidden, model.intermediate),
            bias=False,
            quant_config=config,
            prefix="model.layers.0.mlp.up_proj",
            params_dtype=torch.bfloat16,
        )
    (plan,) = config.worker.plans
    assert (plan.n, plan.k) == (model.intermediate, model.hidden)
    assert plan.shard.style is ParallelStyle.REPLICATED


def test_names_on_disk_that_end_in_linear(
    tmp_path: Path, rank_of: Callable[[int, int], None]
) -> None:
    """Gemma 4 wraps the linears of its towers: `q_proj.linear`, also in the list of plain ones."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.models.transformers.utils import recursive_replace_linear
    from vllm.utils.torch_utils import set_default_torch_dtype

    attention = "vision_tower.encoder.layers.0.self_attn"
    packed, plain = f"{attention}.q_proj.linear", f"{attention}.k_proj.linear"

    def edit(tensors: Tensors) -> None:
        module = "model.layers.0.mlp.down_proj."
        for name in [name for name in tensors if name.startswith(module)]:
            tensors[name.replace(module, f"{packed}.")] = tensors[name].clone()
        tensors[f"{plain}.weight"] = torch.zeros(64, 96).half()

    write_checkpoint(tmp_path, "ct-sym", config={"ignore": ["lm_head", plain]}, edits=[edit])
    checkpoint = read_checkpoint(tmp_path)
    target = TARGETS["cpu"]
    planned = plan_model(checkpoint, target, 2, ranks=[1])
    assert plain in planned.unquantized
    config = config_for(checkpoint, target)
    rank_of(1, 2)
    tower = torch.nn.Module()
    for name in ("q_proj", "k_proj"):
        wrapper = torch.nn.Module()
        wrapper.linear = torch.nn.Linear(96, 64, bias=False, device="meta")
        tower.add_module(name, wrapper)
    with building(), set_default_torch_dtype(torch.bfloat16):
        recursive_replace_linear(tower, config, prefix=attention)
    assert isinstance(tower.k_proj.linear.quant_method, UnquantizedLinearMethod)
    (plan,) = config.worker.plans
    assert plan in planned.layers
    assert (plan.prefix, plan.n, plan.k) == (packed, 64, 96)


def test_one_layer_of_four_parts_in_two_modules(
    tmp_path: Path, rank_of: Callable[[int, int], None]
) -> None:
    """Qwen3.5 stores query, key and value of its linear attention in one module, z in another."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    model = SHAPES["even"]
    write_headers(tmp_path, model, "gptq", GROUPS["even"])
    config = config_for(read_checkpoint(tmp_path), TARGETS["cpu"])
    quarter = model.intermediate // 4
    config.packed_modules_mapping = {"in_proj_qkvz": ["gate_proj", "up_proj"]}
    rank_of(1, 2)
    with building():
        MergedColumnParallelLinear(
            model.hidden,
            [quarter, quarter, 2 * quarter, 4 * quarter],
            bias=False,
            quant_config=config,
            prefix="model.layers.0.mlp.in_proj_qkvz",
            params_dtype=torch.bfloat16,
        )
    (plan,) = config.worker.plans
    names = [part.module.rpartition(".")[2] for part in plan.shard.parts]
    assert names == ["gate_proj", "gate_proj", "gate_proj", "up_proj"]
    assert [part.shard_id for part in plan.shard.parts] == [0, 1, 2, 3]
    assert plan.n == model.intermediate


@pytest.mark.parametrize("build", ["ct-asym", "awq", "bnb-nf4"])
def test_mamba_layers_with_one_group_are_planned_alike(
    tmp_path: Path, rank_of: Callable[[int, int], None], build: str
) -> None:
    """vLLM's mixer, which gives tensors of some names a loader of its own."""
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_fusedq.integration.placeholder import WeightLoader

    config = falcon_h1_config()
    checkpoint = read_checkpoint(write_random_model(tmp_path, config, build).path)
    target = TARGETS["cpu"]
    sizes = (config.hidden_size, config.mamba_d_state, config.mamba_d_conv, config.mamba_d_ssm)
    heads = {"num_heads": config.mamba_n_heads, "head_dim": config.mamba_d_head}
    for tp, rank in ((1, 0), (2, 0), (2, 1), (4, 3)):
        rank_of(rank, tp)
        quantized = {"quant_config": config_for(checkpoint, target), "prefix": "model.1.mixer"}
        with building(), set_default_torch_dtype(torch.bfloat16):
            layer = MambaMixer2(*sizes, True, False, n_groups=1, **heads, **quantized).in_proj
        worker = quantized["quant_config"].worker
        worker.all_created(quantized["quant_config"].format)
        loaders = [parameter.weight_loader for parameter in layer.parameters()]
        assert len(loaders) == len(layer.fusedq_loaders[0].tensor_dtypes)
        assert all(isinstance(each, WeightLoader) for each in loaders)
        here = plan_model(checkpoint, target, tp, ranks=[rank]).layers
        (here,) = (plan for plan in here if plan.prefix == "model.layers.0.mamba.in_proj")
        there = worker.plans[0]
        assert there.prefix == "model.1.mixer.in_proj"
        assert (here.uses, here.resident) == (there.uses, there.resident)
        if tp > 1:
            assert here.shard.parts == there.shard.parts


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_rows_in_head_groups_are_planned_alike(
    tmp_path: Path, rank_of: Callable[[int, int], None], kv_heads: int
) -> None:
    """Falcon's three layouts; key and value heads are replicated where ranks outnumber them."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    heads, hidden = 8, 256
    config = falcon_config(heads, kv_heads)
    checkpoint = read_checkpoint(write_random_model(tmp_path, config, "awq").path)
    target = TARGETS["h200"]
    vllm_config = config_for(checkpoint, target)
    module = "transformer.h.0.self_attention.query_key_value"
    plans = vllm_config.worker.plans
    with building():
        for tp in (1, 2, 4):
            for rank in range(tp):
                rank_of(rank, tp)
                QKVParallelLinear(
                    *(hidden, hidden // heads, heads, kv_heads),
                    bias=False,
                    quant_config=vllm_config,
                    prefix=module,
                    params_dtype=torch.bfloat16,
                )
                here = plan_model(checkpoint, target, tp, ranks=[rank]).layers
                assert next(plan for plan in here if plan.prefix == module) == plans[-1]
    assert len(plans) == 7
