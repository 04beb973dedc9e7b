"""Whether an answer under load is the one that the same request gets alone."""

from collections import Counter
from collections.abc import Mapping, Sequence

from soaking.asks import Ask, Sent
from soaking.client import Answer, Fate

AMX_TOLERANCE = 0.02
"""Nats; torch's and vLLM's own kernels for AMX were not seen to give a row the same bits always."""
TIES_PER_TOKEN = 1 / 200
"""Of the tokens compared, where log-probabilities may differ at all."""


def difference(found: Answer, alone: Answer, tolerance: float = 0.0) -> tuple[str | None, bool]:
    """How what a client read of an answer differs from the one alone, None where it does not; and
    whether it ends in a tie.

    With no `tolerance` tokens and log-probabilities must be the same numbers: cpu-fused gives a row
    the same bits whatever runs beside it. With one, of so many nats, the first token that is
    another one is a tie where the log-probabilities before it agree; what follows is not compared.
    """
    if len(found.tokens) > len(alone.tokens):
        return f"{len(found.tokens)} tokens, alone {len(alone.tokens)}", False
    pairs = zip(found.tokens, alone.tokens, found.logprobs, alone.logprobs, strict=False)
    for i, (token, expected, logprob, expected_logprob) in enumerate(pairs):
        if token != expected:
            return (None, True) if tolerance else (f"token {i} is {token}, alone {expected}", False)
        if abs(logprob - expected_logprob) > tolerance:
            return f"log-probability {i} is {logprob}, alone {expected_logprob}", False
    return None, False


def compare(
    answers: Sequence[tuple[Sent, Answer]], alone: Mapping[Ask, Answer], tolerance: float = 0.0
) -> tuple[list[str], list[str], int]:
    """Lost requests and wrong ones, a line each, and how many ended in a tie."""
    lost, wrong, ties = [], [], 0
    for number, (sent, answer) in enumerate(answers):
        if answer.fate is Fate.LOST:
            lost.append(f"request {number}: {answer.detail}")
        why, tie = difference(answer, alone[sent.ask], tolerance)
        ties += tie
        if why:
            kind = "greedy" if sent.ask.seed is None else f"seed {sent.ask.seed}"
            length = f"{len(sent.ask.prompt)} + {sent.ask.max_tokens} tokens"
            wrong.append(f"request {number} ({length}, {kind}): {why}")
    tokens = sum(len(answer.tokens) for _, answer in answers)
    if ties > tokens * TIES_PER_TOKEN:
        wrong.append(f"{ties} ties in {tokens} tokens, more than rounding explains")
    return lost, wrong, ties


def counts(answers: Sequence[tuple[Sent, Answer]]) -> dict[str, int]:
    """How many requests of each kind there were, and of each fate."""
    found = Counter[str]()
    for sent, answer in answers:
        found[answer.fate.value] += 1
        found["streamed" if sent.stream else "whole"] += 1
        found["greedy" if sent.ask.seed is None else "sampled"] += 1
        found["told_to_cancel"] += sent.give_up is not None
        found["tokens_compared"] += len(answer.tokens)
    return {"sent": len(answers), **dict(sorted(found.items()))}
