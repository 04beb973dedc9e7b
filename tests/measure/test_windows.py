"""Texts from files, and the windows of tokens that models are given."""

from pathlib import Path

import pytest

from vllm_fusedq.errors import ComparisonError
from vllm_fusedq.measure.quality import _windows
from vllm_fusedq.measure.texts import SHIPPED, TextSet, read_texts, shipped
from vllm_fusedq.measure.windows import Tokens, Window, cut, tokenize, tokens_of


class Words:
    """A tokenizer of numbers, one a word, behind `first` where there is one."""

    def __init__(self, first: int | None = None, offset: int = 0) -> None:
        self.bos_token_id = first
        self.offset = offset

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        ids = [int(word) + self.offset * (int(word) > 5) for word in text.split()]
        marked = add_special_tokens and self.bos_token_id is not None
        return {"input_ids": [self.bos_token_id, *ids] if marked else ids}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_texts_are_a_few_kilobytes(name: str) -> None:
    found = shipped(name)
    assert found.name == name
    assert 3000 < len(found.texts[0]) < 8000


def test_files_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntext\n")
    # U+2028 ends no line of JSON
    (tmp_path / "b.jsonl").write_text('{"text": "first \u2028 one"}\n\n{"text": "two", "id": 3}\n')
    assert read_texts("a", tmp_path / "a.txt") == TextSet("a", ("one\ntext\n",))
    assert read_texts("b", tmp_path / "b.jsonl").texts == ("first \u2028 one", "two")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "is neither .jsonl nor .txt"),
        ("a.txt", None, "cannot be read: No such file"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt", b" \n", "text 1 of .* is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ""}', "text 2 of .* is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": 3}', 'line 1 of .* is no object with a string "text"'),
        ("a.jsonl", b'"x"', 'line 1 of .* is no object with a string "text"'),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ComparisonError, match=f"texts 'law'.*{message}"):
        read_texts("law", tmp_path / name)


def test_the_first_token_is_told_from_the_text() -> None:
    assert tokenize(Words(0), "1 2 3") == Tokens((0,), (1, 2, 3))
    assert tokenize(Words(), "1 2 3") == Tokens((), (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "length", "windows"),
    [
        (Tokens((0,), (1, 2, 3, 4)), 3, [(0, 1, 2), (0, 3, 4)]),
        (Tokens((0,), (1, 2, 3)), 3, [(0, 1, 2), (0, 3)]),
        (Tokens((), (1, 2, 3, 4, 5)), 2, [(1, 2), (3, 4)]),
        (Tokens((), (1, 2)), 512, [(1, 2)]),
    ],
)
def test_windows(text: Tokens, length: int, windows: list[tuple[int, ...]]) -> None:
    assert list(cut("s", text, length)) == [Window("s", tokens) for tokens in windows]


def test_a_longer_window_that_no_text_fills_is_not_measured_again() -> None:
    sets = [TextSet("short", ("1 2 3",)), TextSet("long", ("1 2 3 4 5 1 2",))]
    found = _windows(sets, [4, 8], {"a": Words(0)})
    assert list(found) == [("short", 4), ("long", 4), ("long", 8)]
    assert [len(windows) for windows in found.values()] == [1, 3, 1]


def test_tokenizers_have_to_agree() -> None:
    sets = [TextSet("law", ("1 2 3", "4 5 6"))]
    assert len(list(tokens_of(sets, {"a": Words(0), "b": Words(0)}))) == 2
    for other, place in ((Words(0, offset=9), 3), (Words(), 0)):
        message = (
            f"a and b have different tokenizers: text . of 'law' differs from token {place} on"
        )
        with pytest.raises(ComparisonError, match=message):
            list(tokens_of(sets, {"a": Words(0), "b": other}))


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(ComparisonError, match="'law': text 2 is shorter than two tokens"):
        list(tokens_of([TextSet("law", ("1 2", "1"))], {"a": Words(0)}))
