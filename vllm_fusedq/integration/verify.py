"""Runs a model in vLLM's engine under torch's profiler and judges fused layers by the trace."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusedq_kernels.device import current_device
from vllm_fusedq.load import LayerLoader
from vllm_fusedq.trace import LayerTrace, judge, record

PREFILL_TOKENS, DECODE_STEPS = 64, 3
SIZES = (1, 4, 8, 16, 64, 256, 4096)


def verify(
    model: str, dtype: str, settings: dict[str, Any], max_model_len: int, **engine: Any
) -> list[LayerTrace]:
    """Serve `model` in this process: a prefill, some decode steps, then each layer at all `SIZES`.

    Raises:
        FusedQError: the engine refuses the checkpoint.
    """
    # The engine has to run where the profiler looks
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=model,
        quantization="fusedq",
        dtype=dtype,
        additional_config={"fusedq": settings},
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_seqs=1,
        **engine,
    )
    (layers,) = llm.apply_model(_mark_layers)
    prompt = TokensPrompt(prompt_token_ids=list(range(1, PREFILL_TOKENS + 1)))
    sampling = SamplingParams(
        temperature=0, max_tokens=DECODE_STEPS + 1, ignore_eos=True, detokenize=False
    )
    events = _profiled(lambda: llm.generate([prompt], sampling, use_tqdm=False))
    traces = []
    for layer, loader in layers:
        traces += _judge_layer(layer, loader, events)
    return traces


def _mark_layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, LayerLoader]]:
    """Runs where the model is: have every fused layer mark its calls in the trace."""
    layers = []
    for layer in model.modules():
        loader = getattr(layer, "fusedq_loader", None)
        if loader is not None:
            method, plan = layer.quant_method, loader.plan
            method.apply = _marking(method.apply, plan.prefix)
            if plan.gather is not None:
                method.embedding = _marking(method.embedding, plan.prefix, lookup=True)
            layers.append((layer, loader))
    return layers


def _marking(
    apply: Callable[..., torch.Tensor], prefix: str, lookup: bool = False
) -> Callable[..., torch.Tensor]:
    def marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        with record(prefix, lookup):
            return apply(*args, **kwargs)

    return marked


def _judge_layer(
    layer: torch.nn.Module, loader: LayerLoader, served: list[Any]
) -> list[LayerTrace]:
    """The trace of the engine's steps, then one for each number of tokens."""
    packed, plan = loader.packed, loader.plan
    device = packed.qweight.device
    act_dtype = torch.get_default_dtype() if not layer.params_dtype else layer.params_dtype
    spec = current_device(device, fused_op=True)
    traces = []
    for lookup in (True,) * (plan.gather is not None) + (False,) * plan.shard.multiplied:
        call = layer.quant_method.embedding if lookup else layer.quant_method.apply
        traces.append(judge(plan, packed, served, PREFILL_TOKENS, act_dtype, spec, lookup))
        for tokens in SIZES:
            shape, dtype = ((tokens,), torch.int64) if lookup else ((tokens, plan.k), act_dtype)
            x = torch.zeros(shape, dtype=dtype, device=device)
            events = _profiled(lambda call=call, x=x: call(layer, x))
            traces.append(judge(plan, packed, events, tokens, act_dtype, spec, lookup))
    return traces


def _profiled(work: Callable[[], object]) -> list[Any]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as found:
        work()
    return list(found.events())
