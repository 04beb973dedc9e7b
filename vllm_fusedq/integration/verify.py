"""Runs a model in vLLM's engine under torch's profiler and judges fused layers by the trace."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vllm_fusedq.prove.trace import LayerTrace, judge, record

PREFILL_TOKENS, DECODE_STEPS = 64, 3
SIZES = (1, 4, 8, 16, 64, 256, 4096)


def verify(
    model: str, dtype: str, settings: dict[str, Any], max_model_len: int, **engine: Any
) -> list[LayerTrace]:
    """Serve `model` in this process: a prefill, some decode steps, then each layer at all `SIZES`.

    Raises:
        FusedQError: the engine refuses the checkpoint, or there is no device to serve it on.
    """
    # The engine has to run where the profiler looks
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm_fusedq.integration.devices import announced_device

    # Where there is none, vLLM dies with "Device string must not be empty".
    announced_device()
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
    return [trace for layer in layers for trace in _judge_layer(layer, events)]


def _mark_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Runs where the model is: have every fused layer mark its calls in the trace."""
    layers = [layer for layer in model.modules() if hasattr(layer, "fusedq_loader")]
    for layer in layers:
        method, plan = layer.quant_method, layer.fusedq_loader.plan
        method.apply = _marking(method.apply, plan.prefix)
        if plan.gather is not None:
            method.embedding = _marking(method.embedding, plan.prefix, lookup=True)
    return layers


def _marking(
    apply: Callable[..., torch.Tensor], prefix: str, lookup: bool = False
) -> Callable[..., torch.Tensor]:
    def marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        with record(prefix, lookup):
            return apply(*args, **kwargs)

    return marked


def _judge_layer(layer: torch.nn.Module, served: list[Any]) -> list[LayerTrace]:
    """The trace of the engine's steps, then one for each number of tokens."""
    packed, plan = layer.fusedq_loader.packed, layer.fusedq_loader.plan
    target = layer.quant_method.state.target
    act_dtype = target.act_dtype.torch
    traces = []
    for lookup in (True,) * (plan.gather is not None) + (False,) * plan.shard.multiplied:
        call = layer.quant_method.embedding if lookup else layer.quant_method.apply
        sized = [(PREFILL_TOKENS, served)]
        for tokens in SIZES:
            shape, dtype = ((tokens,), torch.int64) if lookup else ((tokens, plan.k), act_dtype)
            x = torch.zeros(shape, dtype=dtype, device=packed.qweight.device)
            sized.append((tokens, _profiled(lambda call=call, x=x: call(layer, x))))
        traces += [judge(plan, packed, events, tokens, target, lookup) for tokens, events in sized]
    return traces


def _profiled(work: Callable[[], object]) -> list[Any]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as found:
        work()
    return list(found.events())
