"""The method of vLLM's layer of experts: plans a rank's two stacks, runs both as one operator."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.config import ParallelConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform

from fusedq_kernels.call import ExpertsCall
from fusedq_kernels.experts import ResidentExperts, Stack
from fusedq_kernels.geometry import round_up
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.integration.activations import ACTIVATIONS, activation_of
from vllm_fusedq.integration.resident import attach, finish
from vllm_fusedq.plan.experts import WEIGHTS, ExpertStack, expert_stack, stack_shards
from vllm_fusedq.plan.layer import plan_layer
from vllm_fusedq.plan.model_code import installed_vllm
from vllm_fusedq.plan.together import join_experts
from vllm_fusedq.prove.launches import LoadedExperts
from vllm_fusedq.worker.state import WorkerState

WITHOUT = "serve this model without --quantization fusedq"
# Where every rank sees all tokens, and adds up what its experts make of them
ALL2ALL = ("allgather_reducescatter", "naive")
# Before it vLLM's experts route by themselves on a CPU
FIRST_CPU_ROUTER = (0, 30)


class FusedQExpertsMethod(FusedMoEMethodBase):
    """Runs the experts of one layer from their packed weights; vLLM routes and adds ranks up."""

    def __init__(self, layer: RoutedExperts, state: WorkerState, prefix: str, stack: ExpertStack):
        super().__init__(layer.moe_config)
        self.state = state
        self.prefix = prefix
        self.stack = stack

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        with self.state.guard():
            check_layer(layer, self.prefix, self.stack)
            config = layer.moe_config
            stack = replace(self.stack, top_k=config.experts_per_token)
            first = config.tp_rank * intermediate_size_per_partition
            inner = (first, first + intermediate_size_per_partition)
            shards = stack_shards(stack, held_experts(layer), inner, config.tp_size, self.prefix)
            target = self.state.target
            plans = join_experts(plan_layer(each, self.stack.formats, target) for each in shards)
            up, down = (plan.main.call for plan in plans)
            activation = activation_of(config)
            assert activation is not None
            call = ExpertsCall(num_experts, activation, up, down)
            self.call = call.text
        for plan in plans:
            attach(layer, plan, self.state, params_dtype)
        w13, w2 = (Stack(**loader.resident) for loader in layer.fusedq_loaders)
        places = None if layer._expert_map is None else len(layer._expert_map)
        resident = ResidentExperts(call, w13, w2, config.experts_per_token, places)
        tokens = gathered_tokens(config, self.state.max_tokens)
        self.state.experts_created(LoadedExperts(self.prefix, resident, tokens))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        finish(layer, self.state)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: what there is to know, the operator's call says."""

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return torch.ops.fusedq.experts(
            *(x, topk_weights, topk_ids, layer._expert_map),
            *(layer.fusedq_w13_qweight, layer.fusedq_w13_scales, layer.fusedq_w13_zeros),
            *(layer.fusedq_w13_bias, layer.fusedq_w13_perm),
            *(layer.fusedq_w2_qweight, layer.fusedq_w2_scales, layer.fusedq_w2_zeros),
            *(layer.fusedq_w2_bias, layer.fusedq_w2_perm),
            self.call,
        )


def experts_method(
    layer: RoutedExperts,
    prefix: str,
    name: str,
    state: WorkerState,
    fmt: CheckpointFormat,
) -> FusedQExpertsMethod | None:
    """The method of a layer of experts, None where the checkpoint leaves them unquantized.

    `name` is what the checkpoint calls what vLLM calls `prefix`.
    """
    formats = quantized_experts(fmt, name)
    if not formats:
        return None
    check_parallel(get_current_vllm_config(), prefix)
    return FusedQExpertsMethod(layer, state, prefix, expert_stack(fmt.checkpoint, name, formats))


def quantized_experts(fmt: CheckpointFormat, name: str) -> dict[str, LayerFormat]:
    below = f"{name}."
    modules = [module for module in fmt.expert_modules if module.startswith(below)]
    return {module: found for module in modules if (found := fmt.layer_of(module)) is not None}


def held_experts(layer: RoutedExperts) -> tuple[int, ...]:
    """The rank's experts by their number in the model, in the order of their places."""
    if (places := layer._expert_map) is None:
        return tuple(range(layer.moe_config.num_local_experts))
    numbers = {place: number for number, place in enumerate(places.tolist()) if place >= 0}
    return tuple(numbers[place] for place in sorted(numbers))


def gathered_tokens(config: Any, tokens: int) -> int:
    """How many tokens experts get at most where each copy of the rest of the model has so many.

    Those of all copies are gathered; where ranks each bring a part, parts are of one size.
    """
    copies = config.dp_size * getattr(config, "pcp_size", 1)
    return copies * round_up(tokens, getattr(config, "sp_size", 1))


def check_parallel(vllm_config: Any, layer: str) -> None:
    """Refuse what vLLM does with experts that these do not follow.

    Raises:
        PreflightError: with every option that has to go.
    """
    parallel: ParallelConfig = vllm_config.parallel_config
    spread = parallel.enable_expert_parallel and (
        parallel.data_parallel_size > 1 or parallel.use_sequence_parallel_moe
    )
    problems = []
    if parallel.enable_eplb:
        found, supported = "--enable-eplb", "experts that stay where they were loaded"
        problems.append(Problem(layer, found, supported, "leave --enable-eplb out"))
    if vllm_config.lora_config is not None:
        found, supported = "--enable-lora on quantized experts", "LoRA on models without experts"
        problems.append(Problem(layer, found, supported, "leave --enable-lora out"))
    if spread and parallel.all2all_backend not in ALL2ALL:
        found, first = f"--all2all-backend {parallel.all2all_backend}", ALL2ALL[0]
        problems.append(Problem(layer, found, first, f"serve with --all2all-backend {first}"))
    if problems:
        raise PreflightError(problems)


def check_layer(layer: RoutedExperts, prefix: str, stack: ExpertStack) -> None:
    """Refuse a layer that does something else than its config's sizes and activation.

    Raises:
        PreflightError: every reason.
    """
    config, activation = layer.moe_config, layer.moe_config.activation.value
    sizes = (len(stack.experts), stack.inner, stack.hidden)
    asked = (
        config.num_logical_experts,
        config.intermediate_size_per_partition * config.tp_size,
        config.hidden_dim,
    )
    version = installed_vllm() or FIRST_CPU_ROUTER
    reasons: Mapping[str, tuple[object, str, str]] = {
        f"a {type(layer).__name__}, a layer of experts with code of its own": (
            type(layer) is not RoutedExperts,
            "vLLM's own RoutedExperts",
            WITHOUT,
        ),
        f"{sizes[0]} experts of [{sizes[1]}, {sizes[2]}] in the checkpoint": (
            sizes != asked,
            f"{asked[0]} of [{asked[1]}, {asked[2]}], which the model's config asks for",
            "config.json and the weights are not of the same model; download both again",
        ),
        f"experts {'with' if stack.is_gated else 'without'} gates in the checkpoint": (
            stack.is_gated != config.activation.is_gated,
            f"those that activation {activation} of the model asks for",
            "config.json and the weights are not of the same model; download both again",
        ),
        f"experts with the activation {activation}": (
            activation_of(config) is None,
            ", ".join(ACTIVATIONS),
            WITHOUT,
        ),
        "experts without the biases that the model has": (
            config.has_bias and stack.biased != set(WEIGHTS),
            "biases of both weights, or a model without any",
            "download the checkpoint again or quantize the model again",
        ),
        f"{config.experts_per_token} experts of a token, weighted by the router on their input": (
            layer.apply_router_weight_on_input and config.experts_per_token > 1,
            "one such expert, as Llama 4 has it",
            WITHOUT,
        ),
        f"experts on a CPU in vLLM {'.'.join(map(str, version))}": (
            version < FIRST_CPU_ROUTER and current_platform.is_cpu(),
            f"vLLM {'.'.join(map(str, FIRST_CPU_ROUTER))} and newer",
            "install a newer vLLM",
        ),
    }
    problems = [
        Problem(prefix, found, supported, fix)
        for found, (holds, supported, fix) in reasons.items()
        if holds
    ]
    if problems:
        raise PreflightError(problems)
