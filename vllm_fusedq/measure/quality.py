"""A model beside its reference on the same windows of tokens, each in an engine of its own."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_fusedq.checkpoint.read import config_sections, read_checkpoint, read_config
from vllm_fusedq.errors import ComparisonError
from vllm_fusedq.formats import format_for
from vllm_fusedq.measure.metrics import Distance, ModelScores, ReferenceScores, distance
from vllm_fusedq.measure.process import run_apart
from vllm_fusedq.measure.texts import TextSet
from vllm_fusedq.measure.windows import Tokens, Window, cut, load_tokenizer, tokens_of

STOCK = "stock"
# Tokens of a window where nobody says otherwise and the models take them
MAX_LENGTH = 512
SCORING = "vllm_fusedq.integration.scoring"
# Told the side, windows done and windows in all; 0 of 0 while its engine starts
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Side:
    """One model as it is served; `way` is what people call it, `quantization` what vLLM is told,
    `settings` those of additional-config "fusedq"."""

    model: str
    way: str
    quantization: str | None
    revision: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model} ({self.way})"


@dataclass(frozen=True)
class Engine:
    """What both engines are given; `dtype` "auto" is each checkpoint's own."""

    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8


@dataclass(frozen=True)
class Measured:
    """One set of texts in windows of one length; `places` [P] are of scored tokens in them."""

    texts: str
    max_length: int
    windows: int
    places: np.ndarray
    distance: Distance


@dataclass(frozen=True)
class Quality:
    """`served` says by side where and in which dtype it ran."""

    model: Side
    reference: Side
    served: dict[str, dict[str, str]]
    measured: tuple[Measured, ...]


def sides(
    model: str,
    against: str,
    revision: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> tuple[Side, Side]:
    """How the model and its reference are served.

    A quantized checkpoint runs by fusedq, but the reference `STOCK`, which is the model's own
    checkpoint by stock vLLM; an unquantized one runs by vLLM.

    Raises:
        CheckpointError: one of them is no model.
        UnsupportedCheckpoint: the model's quantization is not supported.
        ComparisonError: the model is not quantized, or their vocabularies differ.
    """
    config, quantized = read_config(model, revision)
    if not quantized:
        raise ComparisonError(
            f"{model} is not quantized: there is nothing to compare; name the quantized model "
            "first, and the one that it was made from behind --against"
        )
    # What the headers tell against it is told before an engine starts
    format_for(read_checkpoint(model, revision))
    ours = Side(model, "fusedq", "fusedq", revision, dict(settings or {}))
    if against == STOCK:
        return ours, Side(model, "stock vLLM", None, revision)
    other, other_quantized = read_config(against)
    sizes = [_size(each, "vocab_size") for each in (config, other)]
    if sizes[0] != sizes[1]:
        raise ComparisonError(
            f"{model} has a vocabulary of {sizes[0]} tokens and {against} one of {sizes[1]}; a "
            "comparison needs the model that the other one was quantized from"
        )
    if other_quantized:
        # A kernel is insisted on for the model alone
        others = {key: value for key, value in ours.settings.items() if key != "kernel"}
        return ours, Side(against, "fusedq", "fusedq", settings=others)
    return ours, Side(against, "vLLM", None)


def lengths_for(both: Sequence[Side], wanted: Sequence[int]) -> list[int]:
    """Tokens of a window: the `wanted` ones, else `MAX_LENGTH` or what the models take.

    vLLM needs room for one token more than a window has.
    """
    if wanted:
        return sorted(set(wanted))
    limits = [_size(read_config(s.model, s.revision)[0], "max_position_embeddings") for s in both]
    return [min([MAX_LENGTH, *(limit - 1 for limit in limits if limit)])]


def quality(
    both: tuple[Side, Side],
    sets: Sequence[TextSet],
    lengths: Sequence[int],
    engine: Engine,
    on_progress: OnProgress,
) -> Quality:
    """Score `both` (model, reference) on every set in windows of every length.

    A set is not measured again in longer windows where none of its texts fills a longer one.

    Raises:
        ComparisonError: texts or tokenizers allow no comparison.
        EngineError: an engine does not start, refuses the model or ends early.
    """
    model, reference = both
    tokenizers = {s.name: load_tokenizer(s.model, s.revision) for s in both}
    windows = _windows(sets, lengths, tokenizers)
    flat = [window for group in windows.values() for window in group]
    served: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="fusedq-quality-") as folder:
        known: Path | None = None
        scores: list[dict[str, np.ndarray]] = []
        for number, side in enumerate((reference, model)):
            place = Path(folder) / str(number)
            place.mkdir()
            served[side.name] = _score(
                side, flat, engine, max(lengths) + 1, known, place, on_progress
            )
            known = place / "scores.npz"
            with np.load(known) as file:
                scores.append(dict(file))
    measured, start = [], 0
    for (texts, length), group in windows.items():
        places = np.concatenate([np.arange(1, len(window.tokens)) for window in group])
        part = slice(start, start := start + len(places))
        theirs, ours = ({name: rows[part] for name, rows in each.items()} for each in scores)
        found = distance(ReferenceScores(**theirs), ModelScores(**ours))
        measured.append(Measured(texts, length, len(group), places, found))
    return Quality(model, reference, served, tuple(measured))


def _windows(
    sets: Sequence[TextSet], lengths: Sequence[int], tokenizers: dict[str, Any]
) -> dict[tuple[str, int], list[Window]]:
    """The windows of each set at each length, without lengths that change nothing."""
    tokens: dict[str, list[Tokens]] = {}
    for name, text in tokens_of(sets, tokenizers):
        tokens.setdefault(name, []).append(text)
    found: dict[tuple[str, int], list[Window]] = {}
    for name, texts in tokens.items():
        before: list[Window] = []
        for length in lengths:
            windows = [window for text in texts for window in cut(name, text, length)]
            if windows != before:
                found[name, length] = before = windows
    return found


def _score(
    side: Side,
    windows: Sequence[Window],
    engine: Engine,
    max_model_len: int,
    reference: Path | None,
    folder: Path,
    on_progress: OnProgress,
) -> dict[str, str]:
    """Scores in `folder`; what the engine says of itself."""
    request = {
        "engine": {**engine_arguments(side, engine), "max_model_len": max_model_len},
        "windows": [window.tokens for window in windows],
        "reference": str(reference) if reference else None,
    }
    said: dict[str, str] = {}

    def on_report(content: dict[str, Any]) -> None:
        if "windows" in content:
            on_progress(side.name, content["done_windows"], content["windows"])
        elif "stage" in content:
            on_progress(side.name, 0, 0)
        else:
            said.update(content)

    run_apart(SCORING, side.name, request, folder, on_report)
    return said


def engine_arguments(side: Side, engine: Engine) -> dict[str, Any]:
    """vLLM's arguments to serve one side."""
    found = {"model": side.model, "quantization": side.quantization, **asdict(engine)}
    if side.revision:
        found["revision"] = side.revision
    if side.quantization:
        found["additional_config"] = {"fusedq": dict(side.settings)}
    return found


def _size(config: dict[str, Any], key: str) -> int | None:
    """A size of the model or of the language model in it."""
    found = [section.get(key) for section in config_sections(config)]
    return next((size for size in found if type(size) is int and size > 0), None)
