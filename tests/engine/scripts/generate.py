"""Runs `vllm.LLM` on a request read from a JSON file and writes what it said to another.

Request: {"engine": LLM keyword arguments, "prompts": token ids, "max_tokens": int,
"dump": directory for the resident weights of each rank, or null}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    llm = LLM(**request["engine"])
    if request.get("dump"):
        llm.collective_rpc(dump_resident_weights, args=(request["dump"],))
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=0, ignore_eos=True
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
    answers = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "prompt_logprobs": [
                    None if entry is None else entry[token].logprob
                    for token, entry in zip(
                        output.prompt_token_ids, output.prompt_logprobs, strict=True
                    )
                ],
            }
        )
    partial = Path(f"{answer_file}.partial")
    partial.write_text(json.dumps(answers))
    partial.rename(answer_file)


def dump_resident_weights(worker: Any, folder: str) -> None:
    """Runs in each worker: unpack every fused layer and save it with what the rank holds."""
    from fusedq_kernels.layout import unpack

    weights = {}
    for name, module in worker.model_runner.model.named_modules():
        loader = getattr(module, "fusedq_loader", None)
        if loader is None:
            continue
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
    torch.save(weights, Path(folder) / f"rank{worker.rank}.pt")


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
