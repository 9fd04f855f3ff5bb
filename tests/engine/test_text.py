"""Text from ids as they come: whole characters, the spaces that belong there, nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from flexgen.demo import MODEL_DIR
from flexgen.engine.text import Decoder, encode, encode_chat, load_tokenizer, stop_strings
from flexgen.errors import ModelError, RequestError

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
    decoder, emitted = Decoder(TOKENIZER, before, stops), ""
    expected = up_to_stop(text, stops)
    for id in ids:
        emitted += decoder.add([id])
        assert expected.startswith(emitted)
    assert emitted + decoder.end() == expected
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
    added_tokens_decoder: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(self.words[id] for id in ids if id).removeprefix(" ")


def test_a_completion_keeps_the_space_it_begins_with() -> None:
    decoder = Decoder(Words(), [0, 1])
    pieces = [decoder.add([id]) for id in (2, 3, 0, 4, 5)]
    assert "".join(pieces) == " cables is out"


def test_encoding() -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, "a b")) == "</s>a b"
    assert TOKENIZER.decode(encode(TOKENIZER, "a b", special=False)) == "a b"
    with pytest.raises(RequestError, match=r"a text is 3 \(int\); it must be a string"):
        encode(TOKENIZER, 3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="valid Unicode at character 1"):
        encode(TOKENIZER, "a\udcff")


def test_stop_strings() -> None:
    assert stop_strings("ab") == ("ab",) and stop_strings(["a", "b"]) == ("a", "b") and stop_strings(()) == ()
    for wrong in ("", ["a", ""], [3], b"a", 3, None):
        with pytest.raises(RequestError, match="stop (contains|is)"):
            stop_strings(wrong)  # type: ignore[arg-type]


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="mine has no tokenizer .* put its tokenizer files"):
        load_tokenizer(tmp_path, "mine")
    with pytest.raises(ModelError, match="mine has no files"):
        load_tokenizer(None, "mine")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be read") as raised:
        load_tokenizer(tmp_path, "mine")
    assert "\n" not in str(raised.value)


def made(model: Any, decoder: Any, pre: Any = None, special: Sequence[str] = (), **names: str) -> Any:
    """A tokenizer of transformers around parts of the tokenizers library."""
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special), **names
    )


def byte_fallback(decoder: Any = None) -> Any:
    """As Llama 2 has it: characters that are no token are tokens of bytes."""
    vocabulary = {"<unk>": 0, "x": 1, "a": 2, "▁b": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    return made(
        model, decoder or decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), special=["<|end|>"]
    )


def llama_2() -> Any:
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    return byte_fallback(decoders.Sequence(steps))


def byte_level() -> Any:
    vocabulary = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"ðŁ": 256, "Ģa": 257}  # tokens that begin and end inside a character
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made(models.BPE(vocabulary, []), decoders.ByteLevel(), pre, special=["<|end|>"])


def in_bytes(text: str) -> list[int]:
    """Ids of a text in the bytes of `byte_fallback`."""
    return [4 + byte for byte in text.encode()]


def decoded(tokenizer: Any, prompt: Sequence[int], parts: Sequence[Sequence[int]], stop: Any = ()) -> str:
    decoder = Decoder(tokenizer, prompt, stop)
    return "".join([*map(decoder.add, parts), decoder.end()])


def test_a_context_does_not_begin_inside_a_character() -> None:
    tokenizer, prompt = byte_fallback(), in_bytes("日本")
    ids = [*in_bytes("🦙"), 2]
    assert decoded(tokenizer, prompt, [ids]) == "🦙a"
    assert decoded(tokenizer, prompt, [[id] for id in ids]) == "🦙a"


@pytest.mark.parametrize("prompt", ["", "日本", "x"])
@pytest.mark.parametrize("tokenizer", [byte_fallback(), llama_2()])
@pytest.mark.parametrize(("kept", "text"), [(7, "é🦙x"), (6, "é🦙"), (5, "é�"), (3, "é�"), (1, "�")])
def test_a_text_that_ends_inside_a_character(tokenizer: Any, prompt: str, kept: int, text: str) -> None:
    ids = in_bytes("é🦙x")[:kept]
    for parts in ([ids], [[id] for id in ids]):
        assert decoded(tokenizer, in_bytes(prompt), parts) == text


def test_a_character_that_the_prompt_has_begun_belongs_to_the_completion() -> None:
    tokenizer = byte_fallback()
    ids = in_bytes("a日b")
    assert decoded(tokenizer, ids[:3], [ids[3:]]) == "日b"


@given(st.data(), st.sampled_from([byte_fallback, llama_2, byte_level]))
def test_every_division_of_ids_gives_the_same_text(data: st.DataObject, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of()
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=20)
    texts = st.text(alphabet="abx é日🦙", max_size=8).map(lambda t: tokenizer(t).input_ids)
    prompt = data.draw(some | texts)
    ids = sum(data.draw(st.lists(some | texts, max_size=4)), [])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    parts = [ids[a:b] for a, b in pairwise([0, *cuts, len(ids)])]
    text = decoded(tokenizer, prompt, [ids])
    assert decoded(tokenizer, prompt, parts) == text
    assert decoded(tokenizer, prompt, [[id] for id in ids]) == text


@given(st.text(alphabet="abx é日🦙", max_size=12), st.text(alphabet="abx é日🦙", max_size=12))
@pytest.mark.parametrize("tokenizer_of", [byte_fallback, byte_level])
def test_whole_characters_come_back(tokenizer_of: Any, prompt: str, text: str) -> None:
    tokenizer = tokenizer_of()
    text = text.replace(" ", "") if tokenizer_of is byte_fallback else text
    ids = tokenizer(text).input_ids
    assert decoded(tokenizer, tokenizer(prompt).input_ids, [[id] for id in ids]) == text


@pytest.mark.parametrize("tokenizer", [byte_fallback(), llama_2()])
def test_a_stray_byte_does_not_cost_the_character_behind_it(tokenizer: Any) -> None:
    ids = [4 + byte for byte in b"\x80" + "🦙x".encode()]
    assert decoded(tokenizer, [], [[id] for id in ids]) == decoded(tokenizer, [], [ids]) == "�🦙x"


def test_a_replacement_character_of_the_prompt_stays_there() -> None:
    tokenizer = byte_level()
    prompt, ids = tokenizer("x�").input_ids, tokenizer("ab").input_ids
    assert decoded(tokenizer, prompt, [[id] for id in ids]) == "ab"
    assert decoded(byte_fallback(), in_bytes("x")[:1] + in_bytes("日")[:2], [[2], [1]]) == "ax"


def test_bytes_that_are_no_characters_do_not_pile_up() -> None:
    decoder = Decoder(byte_fallback(), [])
    lengths = [len(decoder.add([4 + 0x80])) for _ in range(100)]
    assert sum(lengths) > 90


def test_a_special_token_can_be_a_stop() -> None:
    tokenizer = byte_fallback()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for parts in ([[1, 2, end, 1]], [[1], [2], [end], [1]]):
        assert decoded(tokenizer, [], parts, ["<|end|>"]) == "xa"
        assert decoded(tokenizer, [], parts) == "xax", "it is not shown"


def test_a_stop_does_not_match_across_a_special_token() -> None:
    tokenizer = byte_fallback()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert decoded(tokenizer, [], [[1, end, 2, 1, 2, 2]], ["xa"]) == "xa"
    assert decoded(tokenizer, [], [[1, end, 2, 1]], ["x<|end|>a"]) == ""
    assert decoded(tokenizer, [], [[1, end]], ["x<|end|>a"]) == "x"


def with_bos() -> Any:
    tokenizer = byte_fallback()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_text_gets_one_bos() -> None:
    tokenizer = with_bos()
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, "xa") == encode(tokenizer, "<s>xa") == [bos, 1, 2]
    assert encode(tokenizer, "<s><s>xa") == [bos, bos, 1, 2], "what is written twice stays"
    assert encode(tokenizer, "xa", special=False) == [1, 2]
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_chat(tokenizer, [{"role": "user", "content": "xa"}]) == [bos, 1, 2]


def test_messages_that_are_none_are_refused() -> None:
    tokenizer = with_bos()
    with pytest.raises(ModelError, match="no chat template"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    tokenizer.chat_template = "x"
    with pytest.raises(RequestError, match="message 1 of a chat"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}, {"role": "user"}])


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    sentences = iter(["the cat sat on the mat", "a dog and a cat", "mats and dogs"] * 20)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=280, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    LlamaConfig().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, "a model")
    ids = encode(tokenizer, "the cat 日", special=False)
    assert decoded(tokenizer, [], [[id] for id in ids]) == "the cat 日"
