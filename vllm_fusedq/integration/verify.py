"""Runs a model in vLLM's engine under torch's profiler and judges fused layers by the trace."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusedq_kernels.catalogue import Op
from vllm_fusedq.plan.uses import Use
from vllm_fusedq.prove.trace import LayerTrace, judge, record

PROMPT_TOKENS, NEXT_TOKENS = 64, 3
SIZES = (1, 4, 8, 16, 64, 256, 4096)
# Which of a quantization method's functions vLLM calls for an operator
METHODS = {Op.MATMUL: "apply", Op.EMBEDDING: "embedding", Op.EXPERTS: "apply"}


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
    prompt = TokensPrompt(prompt_token_ids=list(range(1, PROMPT_TOKENS + 1)))
    sampling = SamplingParams(
        temperature=0, max_tokens=NEXT_TOKENS + 1, ignore_eos=True, detokenize=False
    )
    events = _profiled(lambda: llm.generate([prompt], sampling, use_tqdm=False))
    return [trace for layer in layers for trace in _judge_layer(layer, events)]


def _mark_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Runs where the model is: have every fused layer mark its calls in the trace."""
    layers = [layer for layer in model.modules() if hasattr(layer, "fusedq_loaders")]
    for layer in layers:
        for loader in layer.fusedq_loaders:
            for use in loader.plan.uses:
                name = METHODS[use.op]
                marked = _marking(getattr(layer.quant_method, name), loader.plan.name, use.op)
                setattr(layer.quant_method, name, marked)
    return layers


def _marking(call: Callable[..., torch.Tensor], name: str, op: Op) -> Callable[..., torch.Tensor]:
    def marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        with record(name, op):
            return call(*args, **kwargs)

    return marked


def _judge_layer(layer: torch.nn.Module, served: list[Any]) -> list[LayerTrace]:
    """The trace of the engine's steps, then one for each number of tokens."""
    traces = []
    for loader in layer.fusedq_loaders:
        plan, packed = loader.plan, loader.packed
        for use in plan.uses:
            call = getattr(layer.quant_method, METHODS[use.op])
            # An expert has a row for each token that chose it
            rows = layer.top_k if use.op is Op.EXPERTS else 1
            sized = [(PROMPT_TOKENS, served)]
            for tokens in SIZES:
                given = _inputs(layer, use, tokens, packed.qweight.device)
                sized.append((tokens, _profiled(lambda call=call, given=given: call(**given))))
            traces += [judge(plan, use, packed, events, rows * tokens) for tokens, events in sized]
    return traces


def _inputs(layer: torch.nn.Module, use: Use, tokens: int, device: torch.device) -> dict[str, Any]:
    """Token ids to look up, or activations to multiply; experts get tokens by turns."""
    if use.op is Op.EMBEDDING:
        return {"layer": layer, "input_": torch.zeros(tokens, dtype=torch.int64, device=device)}
    features = layer.hidden_size if use.op is Op.EXPERTS else use.call.in_features
    x = torch.zeros((tokens, features), dtype=use.call.dtype.torch, device=device)
    if use.op is not Op.EXPERTS:
        return {"layer": layer, "x": x}
    ids = torch.arange(tokens * layer.top_k, dtype=torch.int32, device=device)
    ids = ids.view(tokens, layer.top_k) % layer.moe_config.num_logical_experts
    return {"layer": layer, "x": x, "topk_weights": ids.float(), "topk_ids": ids}


def _profiled(work: Callable[[], object]) -> list[Any]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as found:
        work()
    return list(found.events())
