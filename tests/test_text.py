"""Text from ids as they come: whole characters, the spaces that belong there, nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flexgen.demo import MODEL_DIR
from flexgen.errors import ModelError, RequestError
from flexgen.text import Decoder, encode, load_tokenizer, stop_strings

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
TEXTS = st.text(alphabet="abn \n7€日ö🙂", max_size=24)


def up_to_stop(text: str, stops: Sequence[str]) -> str:
    """`text` before the first stop string to be complete, character by character."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(TEXTS, TEXTS, st.lists(st.text(alphabet="abn \n7", min_size=1, max_size=4), max_size=3))
def test_pieces_make_the_text_up_to_the_first_stop(prompt: str, text: str, stops: list[str]) -> None:
    before, ids = encode(TOKENIZER, prompt), encode(TOKENIZER, text, special=False)
    decoder, told = Decoder(TOKENIZER, before, stops), ""
    expected = up_to_stop(text, stops)
    for id in ids:
        told += decoder.add([id])
        assert expected.startswith(told)
    assert told + decoder.end() == expected
    assert decoder.stopped == (expected != text)
    at_once = Decoder(TOKENIZER, before, stops)
    assert at_once.add(ids) + at_once.end() == expected


def test_pieces_come_as_soon_as_they_are_sure() -> None:
    ids = encode(TOKENIZER, "ab€ab", special=False)
    decoder = Decoder(TOKENIZER, [], ["b\n"])
    assert "".join(decoder.add([id]) for id in ids) == "ab€a", "the last b may begin the stop"
    assert decoder.end() == "b"


class Words:
    """A tokenizer that drops the space a text begins with, as those with a word's space in its token do."""

    words = ("<s>", " the", " cable", "s", " is", " out")

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(self.words[id] for id in ids if id).removeprefix(" ")


def test_a_completion_keeps_the_space_it_begins_with() -> None:
    decoder = Decoder(Words(), [0, 1])
    pieces = [decoder.add([id]) for id in (2, 3, 0, 4, 5)]
    assert "".join(pieces) == " cables is out"


def test_encoding() -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, "a b")) == "</s>a b"
    assert TOKENIZER.decode(encode(TOKENIZER, "a b", special=False)) == "a b"
    with pytest.raises(RequestError, match="a int; it must be a string"):
        encode(TOKENIZER, 3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="valid Unicode at character 1"):
        encode(TOKENIZER, "a\udcff")


def test_stop_strings() -> None:
    assert stop_strings("ab") == ("ab",) and stop_strings(["a", "b"]) == ("a", "b") and stop_strings(()) == ()
    for wrong in ("", ["a", ""], [3], b"a", 3, None):
        with pytest.raises(RequestError, match="stop (holds|is)"):
            stop_strings(wrong)  # type: ignore[arg-type]


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="mine has no tokenizer .* put its tokenizer files"):
        load_tokenizer(tmp_path, "mine")
    with pytest.raises(ModelError, match="mine comes without files"):
        load_tokenizer(None, "mine")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be read") as raised:
        load_tokenizer(tmp_path, "mine")
    assert "\n" not in str(raised.value)
