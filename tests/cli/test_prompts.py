"""Prompts are read from all supported files; an invalid prompt is refused with its line."""

import json

import pytest

from flexgen.cli.prompts import MAX_NESTING, PromptLine, read_prompts, read_text
from flexgen.errors import RequestError

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "é?"}]
TWO = [{"id": 7, "prompt": "Once\nupon"}, {"messages": CHAT, "x": [1.5, None, {"y": True}]}]


@pytest.fixture
def write(tmp_path):
    """`write(name, content)`: the path of a file."""

    def make(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def as_lines(objects):
    return "".join(json.dumps(each) + "\n" for each in objects)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.b.NDJson"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_json(name, end, mark, write):
    path = write(name, mark + as_lines(TWO).encode().replace(b"\n", end))
    assert read_prompts(path) == [PromptLine(1, TWO[0]), PromptLine(2, TWO[1])]
    whole = write(name, mark + as_lines(TWO).encode().replace(b"\n", end)[: -len(end)])
    assert read_prompts(whole) == read_prompts(path)


@pytest.mark.parametrize("name", ["a.json", "a.JSON"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_array(name, end, mark, write):
    text = json.dumps(TWO, indent=1)
    path = write(name, mark + text.encode().replace(b"\n", end))
    second = text[: text.index('"messages"')].count("\n")
    assert read_prompts(path) == [PromptLine(2, TWO[0]), PromptLine(second, TWO[1])]
    assert [line.fields for line in read_prompts(write(name, mark + json.dumps(TWO).encode()))] == TWO
    assert [line.fields for line in read_prompts(write(name, ' ["a" , \n"b"]\n\n'))] == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]


@pytest.mark.parametrize("name", ["a.txt", "a", "jsonl"])
def test_lines_of_text(name, write):
    path = write(name, b"\xef\xbb\xbf  one \r\n{\x0b\xe2\x80\xa8}\nthree")
    assert [line.fields["prompt"] for line in read_prompts(path)] == ["  one ", "{\x0b\u2028}", "three"]


def test_a_text_has_no_mark_and_one_kind_of_line_ends(write):
    assert read_text(write("a", b"\xef\xbb\xbfa\r\nb\n\r\n")) == "a\nb\n\n"
    with pytest.raises(
        RequestError, match="a is not UTF-8 text: byte 1 is invalid start byte; save it as UTF-8$"
    ):
        read_text(write("a", b"a\xff"))
    with pytest.raises(RequestError, match="it looks like UTF-16.; save it as UTF-8"):
        read_text(write("a", "Once".encode("utf-16")))


def test_nesting_up_to_the_limit_is_kept(write):
    def nested(depth):
        return '{"prompt": "a", "x": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}\n"

    assert read_prompts(write("a.jsonl", nested(MAX_NESTING)))[0].fields["prompt"] == "a"
    with pytest.raises(RequestError, match="line 1: arrays and objects are nested more than 100 levels deep"):
        read_prompts(write("a.jsonl", nested(MAX_NESTING + 1)))


DEEP = '{"prompt": "a", "x": ' + "[" * 50_000 + "]" * 50_000 + "}"
GOOD = '{"prompt": "a"}'
BAD = {
    "blank": (" \t", "the line is blank; write a prompt or remove the line"),
    "cut off": ('{"prompt": ', "not valid JSON: Expecting value at column 12"),
    "two in one": (GOOD + GOOD, "not valid JSON: unexpected text from column 16 on"),
    "not a number": ('{"prompt": "a", "x": NaN}', "NaN is not valid JSON"),
    "infinite": ('{"prompt": "a", "x": [Infinity]}', "Infinity is not valid JSON"),
    "infinite below": ('{"prompt": "a", "x": -Infinity}', "-Infinity is not valid JSON"),
    "beyond floats": ('{"prompt": "a", "x": 1e400}', "1e400 is outside the range of a float"),
    "beyond whole numbers": (
        '{"prompt": "a", "x": ' + "9" * 5000 + "}",
        "not valid JSON: Exceeds the limit",
    ),
    "deep": (DEEP, "arrays and objects are nested more than 100 levels deep"),
    "deep and cut off": ("[" * 50_000, "arrays and objects are nested more than 100 levels deep"),
    "neither": ('{"text": "a"}', 'must be an object with a text or a chat: {"prompt": "..."}'),
    "both": (json.dumps({"prompt": "a", "messages": CHAT}), "must be an object with a text or a chat"),
    "not a text": ('{"prompt": 3}', "must be an object with a text or a chat"),
    "empty": ('{"prompt": ""}', "must be an object with a text or a chat"),
    "answered": ('{"prompt": "a", "completion": "b"}', "the field 'completion' is reserved for the answer"),
    "half a character": ('{"prompt": "a", "x": "\\ud800"}', "a text is not valid Unicode"),
    "half a character in a name": ('{"prompt": "a", "\\ud800": 1}', "a text is not valid Unicode"),
    "no messages": ('{"messages": []}', '"messages" must be a list of objects, each with a "role"'),
    "a text as messages": ('{"messages": "a"}', '"messages" must be a list of objects'),
    "a text as message": ('{"messages": ["a"]}', '"messages" must be a list of objects'),
    "no role": ('{"messages": [{"content": "a"}]}', '"messages" must be a list of objects'),
    "a number": ("3", "must be an object with a text or a chat"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_line_that_is_not_a_prompt(case, write):
    line, said = BAD[case]
    with pytest.raises(RequestError) as raised:
        read_prompts(write("a.jsonl", f"{GOOD}\n{line}\n{GOOD}\n"))
    assert "a.jsonl, line 2: " in str(raised.value) and said in str(raised.value)


@pytest.mark.parametrize("case", sorted(BAD.keys() - {"blank", "two in one", "cut off"}))
def test_an_element_that_is_not_a_prompt(case, write):
    line, said = BAD[case]
    with pytest.raises(RequestError) as raised:
        read_prompts(write("a.json", f"[{GOOD},\n{line},\n{GOOD}]\n"))
    assert "a.json, line 2: " in str(raised.value) and said in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "a.txt is empty; give a file with at least one prompt"),
        ("a.jsonl", "\ufeff", "a.jsonl is empty"),
        ("a.json", " \n", "a.json is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.txt", "one\n\ntwo\n", "a.txt, line 2: the line is blank"),
        ("a.txt", "one\n\n", "a.txt, line 2: the line is blank"),
        ("a.jsonl", '["a"]\n', "line 1: a prompt must be an object .* with the suffix .json"),
        ("a.json", GOOD + "\n" + GOOD, r"does not begin with \[: .* use the suffix .jsonl"),
        ("a.json", f"[{GOOD}\n{GOOD}]", "line 2: not valid JSON: Expecting ',' or ']' at column 1"),
        ("a.json", f"[{GOOD},\n", "line 2: not valid JSON: Expecting value at column 1"),
        ("a.json", f"[{GOOD},]", "line 1: not valid JSON: Expecting value"),
        ("a.json", f"[{GOOD}", "line 1: not valid JSON: Expecting ',' or ']'"),
        ("a.json", f"[{GOOD}]\n]", "unexpected text after the array"),
        ("a.json", "[", "line 1: not valid JSON: Expecting value"),
    ],
)
def test_a_file_that_does_not_hold_prompts(name, text, said, write):
    with pytest.raises(RequestError, match=said):
        read_prompts(write(name, text))
