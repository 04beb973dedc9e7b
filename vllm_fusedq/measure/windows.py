"""Texts as windows of tokens that both models are given.

Texts are cut into windows that do not overlap, each behind the tokenizer's own first token where it
has one (`<s>`). A window's first token has no context and is not scored.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from vllm_fusedq.errors import CheckpointError, ComparisonError
from vllm_fusedq.measure.texts import TextSet


class Window(NamedTuple):
    """Tokens of one text of a set; all but the first are scored."""

    texts: str
    tokens: tuple[int, ...]


class Tokenizer(Protocol):
    """What transformers' tokenizers offer of which this needs something."""

    bos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any: ...


def load_tokenizer(model: str, revision: str | None = None) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    # The tokenizers' library raises bare Exceptions
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{model}: its tokenizer cannot be read: {reason.rstrip(':')}; put the tokenizer files "
            "of the original model beside the weights"
        ) from error


class Tokens(NamedTuple):
    """One text: its tokens, and what the tokenizer puts before every text."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    """A text's tokens without those that only mark its beginning and end."""
    plain = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    marked = tuple(tokenizer(text, verbose=False)["input_ids"])
    first = tokenizer.bos_token_id
    begins = first is not None and marked[:1] == (first,) and marked[: len(plain)] != plain
    return Tokens((first,) if begins else (), plain)


def tokens_of(
    sets: Sequence[TextSet], tokenizers: dict[str, Tokenizer]
) -> Iterator[tuple[str, Tokens]]:
    """Every text's tokens, with the name of its set.

    Args:
        tokenizers: by model, those that have to agree.

    Raises:
        ComparisonError: the tokenizers differ, or a text has fewer than two tokens.
    """
    (model, first), *others = tokenizers.items()
    for name, texts in sets:
        for number, text in enumerate(texts, 1):
            found = tokenize(first, text)
            for other, tokenizer in others:
                _check_equal(f"text {number} of {name!r}", model, found, other, tokenizer, text)
            if len(found.tokens) < 2:
                raise ComparisonError(
                    f"texts {name!r}: text {number} is shorter than two tokens, which leaves "
                    "nothing to predict; leave it out"
                )
            yield name, found


def _check_equal(
    where: str, model: str, found: Tokens, other: str, tokenizer: Tokenizer, text: str
) -> None:
    theirs = tokenize(tokenizer, text)
    if theirs != found:
        ours, others = found.prefix + found.tokens, theirs.prefix + theirs.tokens
        pairs = enumerate(zip(ours, others, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(others)))
        raise ComparisonError(
            f"{model} and {other} have different tokenizers: {where} differs from token {place} "
            "on; a comparison token by token needs the model that the other one was quantized from"
        )


def cut(name: str, text: Tokens, length: int) -> Iterator[Window]:
    """Windows of at most `length` tokens; a last one with nothing to score is left out."""
    step = length - len(text.prefix)
    for start in range(0, len(text.tokens), step):
        window = text.prefix + text.tokens[start : start + step]
        if len(window) > 1:
            yield Window(name, window)
