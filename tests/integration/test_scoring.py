"""What the scoring process makes of the engine's log-probabilities."""

import numpy as np

from vllm_fusedq.integration import scoring
from vllm_fusedq.measure.metrics import ModelScores, ReferenceScores


class Flat:
    """Two positions with their own token first, then the three most likely, best first."""

    token_ids = (7, 3, 7, 5, 9, 4, 8, 2)
    logprobs = (-2.0, -1.0, -2.0, -3.0, -6.0, -0.5, -1.5, -2.5)


def test_rows_of_the_engines_answer() -> None:
    found = scoring._rows(Flat, 3)
    assert found["token"].tolist() == [-2.0, -6.0]
    assert found["top_ids"].tolist() == [[3, 7, 5], [4, 8, 2]]
    assert found["top"].tolist() == [[-1.0, -2.0, -3.0], [-0.5, -1.5, -2.5]]
    assert ReferenceScores(**found).top.shape == (2, 3)


def test_what_the_model_does_not_tell_is_unknown() -> None:
    wanted = np.array([[7, 1], [2, 4]])
    found = scoring._at(scoring._rows(Flat, 3), wanted)
    assert np.isnan(found["at_top"][0, 1])
    assert found["at_top"][0, 0] == -2.0
    assert found["at_top"][1].tolist() == [-2.5, -0.5]
    assert found["best"].tolist() == [-1.0, -0.5]
    assert ModelScores(**found).token.tolist() == [-2.0, -6.0]


def test_lots_hold_whole_windows(monkeypatch) -> None:
    monkeypatch.setattr(scoring, "LOT_TOKENS", 5)
    windows = [[1, 2, 3], [4, 5], [6], [7] * 9, [8]]
    lots = list(scoring._lots(windows))
    assert lots == [[[1, 2, 3], [4, 5]], [[6]], [[7] * 9], [[8]]]
