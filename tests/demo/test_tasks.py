"""The tasks have correct answers, and the embedded model gives them."""

import re
from datetime import datetime
from decimal import Decimal

import pytest

from flexgen.demo import MODEL_DIR, TASKS, Record, accuracy, is_right, records
from flexgen.demo.tasks import is_held_out

MAX_BYTES = 8_000_000
FACTORS = {
    ("km", "m"): 1000,
    ("m", "cm"): 100,
    ("cm", "mm"): 10,
    ("t", "kg"): 1000,
    ("kg", "g"): 1000,
    ("l", "ml"): 1000,
}
DATE_FORMATS = ("%d %B %Y", "%B %d, %Y", "%d %b %Y", "%d.%m.%Y")


def parse_date(written: str) -> datetime:
    """The date written, whichever of the four spellings it has."""
    for spelling in DATE_FORMATS:
        try:
            return datetime.strptime(written, spelling)
        except ValueError:
            continue
    raise AssertionError(f"no known spelling of a date: {written}")


def is_impossible(fact: str) -> bool:
    """Whether one fact of a `wrong` record breaks its rule."""
    if match := re.fullmatch(r"age (\d+)", fact):
        return int(match[1]) > 150
    if match := re.fullmatch(r"born \d{4}-(\d\d)-\d\d", fact):
        return not 1 <= int(match[1]) <= 12
    if match := re.fullmatch(r"from (\d+):00 to (\d+):00", fact):
        return int(match[1]) > int(match[2])
    assert fact.startswith("city:")
    return fact == "city:"


def lines_of(task: str) -> list[tuple[list[str], str]]:
    """The prompt lines and the answer of three hundred records of one task, of both parts."""
    drawn = records(150, 5, [task]) + records(150, 5, [task], held_out=False)
    return [(record.prompt.split("\n"), record.answer) for record in drawn]


def test_same_arguments_same_records():
    assert records(50, 7) == records(50, 7)
    assert records(50, 7) != records(50, 8)
    assert records(50, 7)[:20] == records(20, 7)


def test_tasks_take_turns():
    drawn = records(103, 1)
    counts = [sum(record.task == task for record in drawn) for task in TASKS]
    assert len(drawn) == 103 and max(counts) - min(counts) <= 1
    assert {record.task for record in records(6, 1, ["date", "unit"])} == {"date", "unit"}
    assert records(0, 1) == []


def test_a_task_that_has_no_more_records_says_so():
    with pytest.raises(ValueError, match="task 'unit' has no more"):
        records(20_000, 1, ["unit"])


def test_held_out_records_are_never_trained_on():
    held_out, trained = records(1000, 3), records(1000, 3, held_out=False)
    assert all(is_held_out(record.prompt) for record in held_out)
    assert not any(is_held_out(record.prompt) for record in trained)
    assert len({record.prompt for record in held_out}) == 1000


def test_every_prompt_and_answer_is_plain_and_short():
    for record in records(500, 11):
        assert record.prompt == record.prompt.strip()
        assert record.answer == record.answer.strip() and "\n" not in record.answer
        assert record.text == record.prompt + " " + record.answer + "\n"


def test_field_answers_stand_in_the_text():
    sorts = {
        "name": r"[A-Z]\w+ [A-Z]\w+",
        "city": r"[A-Z]\w+",
        "item": "[a-z]+",
        "count": r"\d+",
        "day": r"\w+day",
    }
    for (text, question, _), answer in lines_of("field"):
        assert re.search(rf"\b{re.escape(answer)}\b", text)
        assert re.fullmatch(sorts[question.removeprefix("Field: ")], answer)


def test_date_answers():
    for (text, _, _), answer in lines_of("date"):
        assert parse_date(text.removeprefix("Date: ")).strftime("%Y-%m-%d") == answer


def test_unit_answers():
    for (text, question, _), answer in lines_of("unit"):
        _, amount, given = text.split(" ")
        asked = question.removeprefix("Unit: ")
        assert answer == f"{int(Decimal(amount) * FACTORS[given, asked])} {asked}"


def test_wrong_has_one_impossible_record():
    for (_, *lines, _), answer in lines_of("wrong"):
        facts = {line[0]: line.split(", ", 1)[1] for line in lines}
        assert [letter for letter, fact in facts.items() if is_impossible(fact)] == [answer]


def test_lookup_answers():
    for (table, question), answer in lines_of("lookup"):
        rows = dict(row.split(" ") for row in table.split(": ")[1].split(", "))
        assert 3 <= len(rows) == len(set(rows.values()))
        assert rows[question.split(" ")[-1]] == answer


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" Oslo\n", True),
        ("Oslo", True),
        (" Oslo  \nText: more", True),
        (" Oslo.", False),
        (" oslo\n", False),
        ("\n Oslo", False),
        ("", False),
        (" Oslo Oslo\n", False),
    ],
)
def test_is_right(completion: str, right: bool):
    assert is_right(Record("field", "Answer:", "Oslo"), completion) is right


def test_accuracy():
    asked = [Record("a", "p", "1"), Record("a", "q", "2"), Record("b", "r", "3")]
    assert accuracy(asked, [" 1\n", " 1\n", " 3"]) == {"a": 0.5, "b": 1.0, "all": 2 / 3}
    assert accuracy([], []) == {"all": 0.0}
    with pytest.raises(ValueError, match="3 records but 1"):
        accuracy(asked, ["1"])


def test_the_model_is_small():
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*")) <= MAX_BYTES


def test_the_tokenizer_gives_text_back():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    texts = [record.text for record in records(20, 2)] + [
        "Zürich  30 °C\n\tx = {'a': 1}  don 't , ok",
        "日本 🙂",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 2
        assert max(ids) < len(tokenizer)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(len(tokenizer(record.prompt)["input_ids"]) for record in records(500, 2)) <= 96
    assert tokenizer.padding_side == "left"


def test_the_model_is_right_on_fresh_records():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    asked = records(40, 20_261)
    batch = tokenizer([record.prompt for record in asked], return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    newline = tokenizer.encode("\n", add_special_tokens=False)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=newline
    )
    completions = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert accuracy(asked, completions)["all"] >= 0.85
