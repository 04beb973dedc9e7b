"""Scores windows of tokens in vLLM's engine; runs in a process of its own (`measure/process.py`).

Answers `scores.npz`. Of a reference: token [P], top_ids and top [P, R]. Of a model that is compared
with one: token [P], best [P] and at_top [P, R], NaN where none of its own most likely tokens is the
reference's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from vllm_fusedq.integration.devices import announced_device
from vllm_fusedq.measure.machine import describe
from vllm_fusedq.measure.metrics import REFERENCE_TOP
from vllm_fusedq.measure.process import OnReport, answer

# Of a compared model's most likely tokens; nearly all of the reference's are among them
MODEL_TOP = 512
# Logits of so many tokens are in memory at once
BATCH_TOKENS = 1024
# Windows go to the engine in lots, so that their log-probabilities are Python objects for a while
LOT_TOKENS = 8192


def main(request: dict[str, Any], folder: Path, report: OnReport) -> None:
    """`request`: "engine" (LLM's arguments), "windows", "reference" (a file of scores, or null)."""
    windows = request["windows"]
    announced_device()
    report({"stage": "starting"})
    llm = LLM(
        **request["engine"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=BATCH_TOKENS,
        max_num_seqs=8,
        max_logprobs=MODEL_TOP,
    )
    config = llm.llm_engine.vllm_config
    report({"dtype": str(config.model_config.dtype).removeprefix("torch."), **_place()})
    wanted = MODEL_TOP if request["reference"] else REFERENCE_TOP
    top = min(config.model_config.get_vocab_size(), wanted)
    reference = np.load(request["reference"])["top_ids"] if request["reference"] else None
    lots, done = [], 0
    report({"done_windows": 0, "windows": len(windows)})
    for lot in _lots(windows):
        found = _score(llm, lot, top)
        if reference is not None:
            start = sum(len(each["token"]) for each in lots)
            found = _at(found, reference[start : start + len(found["token"])])
        lots.append(found)
        done += len(lot)
        report({"done_windows": done, "windows": len(windows)})
    scores = {name: np.concatenate([lot[name] for lot in lots]) for name in lots[0]}
    np.savez(folder / "scores.npz", **scores)


def _place() -> dict[str, str]:
    import vllm
    from vllm.platforms import current_platform

    device = describe(torch.device(current_platform.device_type))
    return {"device": device, "vllm": vllm.__version__}


def _lots(windows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    lot: list[list[int]] = []
    for window in windows:
        if lot and sum(map(len, lot)) + len(window) > LOT_TOKENS:
            yield lot
            lot = []
        lot.append(window)
    yield lot


def _score(llm: LLM, windows: list[list[int]], top: int) -> dict[str, np.ndarray]:
    sampling = SamplingParams(
        temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=top, flat_logprobs=True
    )
    prompts = [TokensPrompt(prompt_token_ids=window) for window in windows]
    found = [
        _rows(output.prompt_logprobs, top)
        for output in llm.generate(prompts, sampling, use_tqdm=False)
    ]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def _rows(flat: Any, top: int) -> dict[str, np.ndarray]:
    """Of one window: each position but the first holds its own token, then the most likely ones."""
    ids = np.asarray(flat.token_ids, np.int32).reshape(-1, top + 1)
    values = np.asarray(flat.logprobs, np.float32).reshape(-1, top + 1)
    return {"token": values[:, 0], "top_ids": ids[:, 1:], "top": values[:, 1:]}


def _at(found: dict[str, np.ndarray], wanted: np.ndarray) -> dict[str, np.ndarray]:
    """The log-probabilities of the reference's tokens among the model's most likely ones."""
    order = np.argsort(found["top_ids"], axis=1)
    ids = np.take_along_axis(found["top_ids"], order, axis=1)
    values = np.take_along_axis(found["top"], order, axis=1)
    at_top = np.full(wanted.shape, np.nan, np.float32)
    for row, (own, value, ask) in enumerate(zip(ids, values, wanted, strict=True)):
        place = np.searchsorted(own, ask).clip(max=len(own) - 1)
        at_top[row] = np.where(own[place] == ask, value[place], np.nan)
    return {"token": found["token"], "best": found["top"].max(axis=1), "at_top": at_top}


if __name__ == "__main__":
    answer(main)
