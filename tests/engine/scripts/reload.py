"""Loads a checkpoint with `vllm.LLM`, then others into the same engine, and says what became of it.

Request: {"engine": LLM keyword arguments, "prompts": token ids, "reloads": checkpoint paths}.
Answer: for the first checkpoint and each of "reloads" {"prompt_logprobs" of each prompt,
"pointers" of each rank's resident tensors, "error" or null}.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    llm = LLM(**request["engine"])
    answers = [describe(llm, request["prompts"], None)]
    for path in request["reloads"]:
        error = None
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        except Exception as caught:
            error = str(caught)
        answers.append(describe(llm, request["prompts"], error))
    partial = Path(f"{answer_file}.partial")
    partial.write_text(json.dumps(answers))
    partial.rename(answer_file)


def describe(llm: LLM, prompts: list[list[int]], error: str | None) -> dict[str, Any]:
    if error is not None:
        return {"error": error}
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    llm.reset_prefix_cache()
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False
    )
    logprobs = [
        [
            None if entry is None else entry[token].logprob
            for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        ]
        for output in outputs
    ]
    return {
        "prompt_logprobs": logprobs,
        "pointers": llm.collective_rpc(resident_pointers),
        "error": None,
    }


def resident_pointers(worker: Any) -> dict[str, int]:
    """Runs in each worker: where the tensors that the kernel reads lie in memory."""
    return {
        name: buffer.data_ptr()
        for name, buffer in worker.model_runner.model.named_buffers()
        if "fusedq_" in name
    }


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
