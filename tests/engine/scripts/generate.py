"""Runs `vllm.LLM` on a request read from a JSON file and writes what it said to another.

Request: {"engine": LLM keyword arguments, "prompts": token ids, "max_tokens": int,
"dump": directory for the resident weights of each rank, also of a draft model, and for what its KV
caches are, or null,
"adapters": directories of LoRA adapters, with each of which the prompts are answered once more}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    llm = LLM(**request["engine"])
    if request.get("dump"):
        llm.collective_rpc(dump_resident_weights, args=(request["dump"],))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        logprobs=2,
        prompt_logprobs=None if request["engine"].get("enable_lora") else 0,
        ignore_eos=True,
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
    adapters: list[LoRARequest | None] = [None]
    for path in request["adapters"]:
        adapters.append(LoRARequest(path, len(adapters), path))
    outputs = llm.generate(
        prompts * len(adapters),
        sampling,
        use_tqdm=False,
        lora_request=[adapter for adapter in adapters for _ in prompts],
    )
    answers = []
    for output in outputs:
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": chosen(output.outputs[0].token_ids, output.outputs[0].logprobs),
                "margin": margin(output.outputs[0].logprobs[0]),
                "prompt_logprobs": chosen(output.prompt_token_ids, output.prompt_logprobs),
            }
        )
    partial = Path(f"{answer_file}.partial")
    partial.write_text(json.dumps(answers))
    partial.rename(answer_file)


def margin(entries: dict[int, Any]) -> float:
    """How much likelier the likeliest token is than the next, in nats."""
    first, second = sorted((entry.logprob for entry in entries.values()), reverse=True)[:2]
    return first - second


def chosen(tokens: list[int], entries: list[dict[int, Any]] | None) -> list[float | None] | None:
    """The log-probability of each token, or None where the engine was not asked."""
    if entries is None:
        return None
    return [
        None if entry is None else entry[token].logprob
        for token, entry in zip(tokens, entries, strict=True)
    ]


def dump_resident_weights(worker: Any, folder: str) -> None:
    """Runs in each worker: save every fused layer unpacked, and the KV caches."""
    runner = worker.model_runner
    torch.save(kv_caches(runner.model), Path(folder) / f"kv{worker.rank}.pt")
    torch.save(resident_weights(runner.model), Path(folder) / f"rank{worker.rank}.pt")
    if (drafter := getattr(runner, "drafter", None)) is not None:
        torch.save(resident_weights(drafter.model), Path(folder) / f"draft{worker.rank}.pt")


def kv_caches(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The dtype and the scales with which each attention layer reads and writes its KV cache."""
    return {
        name: {
            "dtype": module.kv_cache_dtype,
            "scales": torch.stack([module._k_scale.reshape(()), module._v_scale.reshape(())]),
            "floats": (module._k_scale_float, module._v_scale_float),
        }
        for name, module in model.named_modules()
        if hasattr(module, "_k_scale_float")
    }


def resident_weights(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    from fusedq_kernels.layouts.packing import unpack

    weights = {}
    for name, module in model.named_modules():
        if not hasattr(module, "fusedq_loaders"):
            continue
        (loader,) = module.fusedq_loaders
        logical = unpack(loader.packed)
        parts = [
            (p.module, p.region.n_start, p.region.n_stop, p.region.k_start, p.region.k_stop)
            for p in loader.plan.shard.parts
        ]
        weights[name] = {
            "codes": logical.codes,
            "scales": logical.scales,
            "zeros": logical.zeros,
            "group_size": logical.spec.group_size,
            "parts": parts,
        }
    return weights


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
