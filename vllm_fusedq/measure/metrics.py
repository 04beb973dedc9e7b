"""How far a model's predictions are from a reference model's on the same tokens. Pure, in float64.

All logarithms are natural; differences of log-probabilities and divergences are in nats.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
# How many of the reference's outcomes count one by one in the divergence
REFERENCE_TOP = 100
# Probabilities come in fp32: less than this is rounding
_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """Of P scored tokens: `token` [P] their log-probabilities, `top_ids` and `top` [P, R] the most
    likely tokens and their log-probabilities, best first."""

    token: Floats
    top_ids: NDArray[np.integer]
    top: Floats


@dataclass(frozen=True, slots=True)
class ModelScores:
    """Of the same P tokens: `token` [P], `best` [P] the highest log-probability of all, and
    `at_top` [P, R] those of the reference's `top_ids`, NaN where they are unknown."""

    token: Floats
    best: Floats
    at_top: Floats


@dataclass(frozen=True, slots=True)
class Distance:
    """`differences` and `divergences` are by token; `compared` is the share of the reference's
    probability whose outcomes the divergence compares one by one."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    perplexity_ratio: float
    mean_difference: float
    p99_difference: float
    top1_agreement: float
    mean_kl: float
    p99_kl: float
    compared: float
    differences: Floats
    divergences: Floats


def distance(reference: ReferenceScores, model: ModelScores) -> Distance:
    """Every measure over all P tokens; P is at least 1."""
    ours, theirs = model.token.astype(np.float64), reference.token.astype(np.float64)
    differences = np.abs(ours - theirs)
    # Logits that are no numbers are no distribution, however few outcomes are known of it
    kl = np.where(np.isnan(ours), np.nan, divergences(reference.top, model.at_top))
    return Distance(
        tokens=len(ours),
        reference_perplexity=float(np.exp(-theirs.mean())),
        perplexity=float(np.exp(-ours.mean())),
        perplexity_ratio=float(np.exp(theirs.mean() - ours.mean())),
        mean_difference=float(differences.mean()),
        p99_difference=float(np.percentile(differences, 99)),
        top1_agreement=float(agreements(reference.top, model).mean()),
        mean_kl=float(kl.mean()),
        p99_kl=float(np.percentile(kl, 99)),
        compared=float(_compared(reference.top, model.at_top).mean()),
        differences=differences,
        divergences=kl,
    )


def divergences(reference_top: Floats, at_top: Floats) -> Floats:
    """KL(reference || model) of each token, over the reference's R most likely outcomes.

    All other outcomes, and those of the R whose log-probability is unknown (NaN), are one outcome
    together, so that both sides sum to 1. This never exceeds the divergence over all outcomes.
    """
    log_p, log_q = reference_top.astype(np.float64), at_top.astype(np.float64)
    known = ~np.isnan(log_q)
    p, q = (np.exp(np.where(known, logs, -np.inf)) for logs in (log_p, log_q))
    each = np.zeros_like(p)
    np.multiply(p, np.subtract(log_p, log_q, where=p > 0, out=each), where=p > 0, out=each)
    rest_p, rest_q = (np.maximum(1 - side.sum(axis=1), _LEAST) for side in (p, q))
    return each.sum(axis=1) + rest_p * np.log(rest_p / rest_q)


def agreements(reference_top: Floats, model: ModelScores) -> NDArray[np.bool_]:
    """Whether a token that the reference holds for most likely is one that the model does too."""
    likeliest = reference_top == reference_top[:, :1]
    return (likeliest & (model.at_top >= model.best[:, None])).any(axis=1)


def _compared(reference_top: Floats, at_top: Floats) -> Floats:
    return np.where(np.isnan(at_top), 0.0, np.exp(reference_top.astype(np.float64))).sum(axis=1)
