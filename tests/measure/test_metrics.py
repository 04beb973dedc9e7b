"""Measures against torch in float64 over whole distributions."""

import numpy as np
import pytest
import torch

from vllm_fusedq.measure.metrics import ModelScores, ReferenceScores, distance, divergences

TOKENS, VOCAB, TOP = 300, 40, 10


@pytest.fixture(scope="module")
def logs() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a reference and of a model near it, `[TOKENS, VOCAB]`."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    near = logits + 0.3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return logits.log_softmax(1), near.log_softmax(1)


def scores(
    p: torch.Tensor, q: torch.Tensor, top: int, known: int = VOCAB
) -> tuple[ReferenceScores, ModelScores, torch.Tensor]:
    """As an engine would tell them; token 3 is the text's. `known` of the model's are told."""
    values, ids = p.topk(top, dim=1)
    told = q >= q.topk(known, dim=1).values[:, -1:]
    at_top = torch.where(told, q, torch.nan).gather(1, ids)
    reference = ReferenceScores(p[:, 3].numpy(), ids.numpy(), values.numpy())
    return reference, ModelScores(q[:, 3].numpy(), q.amax(1).numpy(), at_top.numpy()), ids


def test_everything_against_torch(logs: tuple[torch.Tensor, torch.Tensor]) -> None:
    p, q = logs
    found = distance(*scores(p, q, VOCAB)[:2])
    target = torch.full((TOKENS,), 3)
    perplexities = [torch.nn.functional.nll_loss(side, target).exp().item() for side in (q, p)]
    differences = (q - p)[:, 3].abs()
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert found.tokens == TOKENS
    assert found.perplexity == pytest.approx(perplexities[0], rel=1e-12)
    assert found.reference_perplexity == pytest.approx(perplexities[1], rel=1e-12)
    assert found.perplexity_ratio == pytest.approx(perplexities[0] / perplexities[1], rel=1e-12)
    assert found.mean_difference == pytest.approx(differences.mean().item(), rel=1e-12)
    assert found.p99_difference == pytest.approx(differences.quantile(0.99).item(), rel=1e-12)
    agreement = (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert found.top1_agreement == pytest.approx(agreement)
    assert 0 < agreement < 1
    assert found.mean_kl == pytest.approx(kl.mean().item(), abs=1e-7)
    assert found.p99_kl == pytest.approx(kl.quantile(0.99).item(), abs=1e-6)
    assert found.compared == pytest.approx(1)
    np.testing.assert_allclose(found.divergences, kl.numpy(), atol=1e-7)


@pytest.mark.parametrize("known", [VOCAB, 15, 5])
def test_outcomes_beyond_the_top_are_one(
    logs: tuple[torch.Tensor, torch.Tensor], known: int
) -> None:
    p, q = logs
    reference, model, ids = scores(p, q, TOP, known)
    exact = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    found = divergences(reference.top, model.at_top)
    for token in range(TOKENS):
        singles = [i for i in ids[token].tolist() if q[token, i] >= q[token].topk(known).values[-1]]
        others = [i for i in range(VOCAB) if i not in singles]
        sides = [
            torch.cat([side[token, singles].exp(), side[token, others].exp().sum()[None]])
            for side in (p, q)
        ]
        coarse = torch.nn.functional.kl_div(sides[1].log(), sides[0], reduction="sum").item()
        assert found[token] == pytest.approx(coarse, abs=1e-9)
        assert found[token] <= exact[token].item() + 1e-9
    compared = distance(reference, model).compared
    alone = torch.where(q >= q.topk(known, dim=1).values[:, -1:], p.exp(), 0).gather(1, ids)
    assert compared == pytest.approx(alone.sum(1).mean().item())
    assert compared < 1


def test_equal_models_are_at_no_distance(logs: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = distance(*scores(logs[0], logs[0], TOP)[:2])
    assert (found.perplexity_ratio, found.mean_difference, found.top1_agreement) == (1, 0, 1)
    assert found.mean_kl == 0


def test_a_tie_is_no_disagreement() -> None:
    """16-bit logits tie often, and an engine orders them as it likes."""
    top = np.log(np.array([[0.4, 0.4, 0.2]]))
    reference = ReferenceScores(top[:, 0], np.array([[7, 8, 9]]), top)
    other = np.log(np.array([[0.3, 0.5, 0.2]]))
    model = ModelScores(other[:, 0], other.max(axis=1), other)
    assert distance(reference, model).top1_agreement == 1


def test_a_model_of_nans_is_infinitely_far(logs: tuple[torch.Tensor, torch.Tensor]) -> None:
    broken = torch.full_like(logs[0], torch.nan)
    reference, _, _ = scores(logs[0], logs[0], TOP)
    nothing = broken[:, :TOP].numpy()
    found = distance(reference, ModelScores(broken[:, 0].numpy(), broken[:, 0].numpy(), nothing))
    assert np.isnan([found.perplexity, found.mean_difference, found.mean_kl]).all()
    assert found.top1_agreement == 0


def test_what_the_model_holds_for_impossible_is_infinitely_far() -> None:
    top = np.log(np.array([[0.9, 0.1]]))
    with np.errstate(divide="ignore"):
        model = np.log(np.array([[0.0, 1.0]]))
    assert divergences(top, model)[0] == np.inf
    assert divergences(model[:, ::-1], top)[0] == pytest.approx(-np.log(0.9))
