"""Decoded and prefilled tokens per second of a vLLM engine in this process."""

import time

from vllm import LLM, SamplingParams, TokensPrompt


def decode_rates(
    llm: LLM, batch: int, prompt_tokens: int, decode_tokens: tuple[int, int], repeats: int
) -> list[float]:
    """Generated tokens per second of the whole batch; the prefill cancels in the difference of
    generating the fewer and the more `decode_tokens`."""
    prompts = [prompt(prompt_tokens, seed) for seed in range(batch)]
    few, many = decode_tokens
    generate_seconds(llm, prompts, few)
    rates = []
    for _ in range(repeats):
        seconds = generate_seconds(llm, prompts, many) - generate_seconds(llm, prompts, few)
        rates.append(batch * (many - few) / seconds)
    return rates


def prefill_rates(llm: LLM, tokens: int, repeats: int) -> list[float]:
    """Prompt tokens per second of one request that generates a single token."""
    generate_seconds(llm, [prompt(tokens, 0)], 1)
    return [
        tokens / generate_seconds(llm, [prompt(tokens, seed)], 1) for seed in range(1, repeats + 1)
    ]


def generate_seconds(llm: LLM, prompts: list[TokensPrompt], max_tokens: int) -> float:
    """Wall time of one `generate` call that runs to its last token."""
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    start = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start


def prompt(tokens: int, seed: int) -> TokensPrompt:
    """Token ids that differ with the seed and lie in every vocabulary."""
    return TokensPrompt(prompt_token_ids=[(7 * seed + 13 * i) % 60 + 3 for i in range(tokens)])
