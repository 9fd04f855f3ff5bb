"""Tasks with exact answers, of the kind that you might run overnight over a table.

Each record is a prompt and the only correct continuation on the same line:

=========  ==================================================================================
`field`    extract a field from a sentence about an order
`date`     write a date as year-month-day
`unit`     convert a quantity to a smaller metric unit
`wrong`    name the one record of three or four that breaks an obvious rule
`lookup`   read a value from a small table
=========  ==================================================================================

The records are generated. The checksum of a prompt decides whether it is *held out*, which is one prompt in eight.
Training uses only the others, so a held-out record is unseen for any seed and any length of training. By default,
`records` returns held-out records, and never the same prompt twice in one call.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _words(line: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(line.split())


FIRST_NAMES = _words(
    "Adam Alice Anna Ben Carl Carmen Clara David Elena Emma Erik Eva Felix Grace Hugo Ivan "
    "Jack Jonas Julia Karin Laura Leo Lucas Maria Nina Omar Oscar Paul Rosa Sara Tom Vera"
)
LAST_NAMES = _words(
    "Adler Baker Berg Brown Carter Costa Diaz Fischer Garcia Haas Hansen Jensen Keller Klein Kovacs Larsen "
    "Lopez Marino Meyer Moreau Nilsson Novak Olsen Peters Ricci Rossi Santos Silva Smith Torres Weber Young"
)
CITIES = _words(
    "Athens Berlin Bergen Boston Cairo Chicago Dublin Geneva Hamburg Lagos Lima Lisbon London Lyon "
    "Madrid Milan Munich Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Tokyo Turin Vienna "
    "Warsaw Zurich"
)
ITEMS = _words(
    "bags belts books bowls boxes cables chairs clocks coats cups desks doors drums fans forks gloves "
    "hats keys knives lamps locks maps pens pipes plates ropes rugs scarves shelves shoes tables tents"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")

UNITS: tuple[tuple[str, str, str, int], ...] = (
    ("Length", "km", "m", 3),
    ("Length", "m", "cm", 2),
    ("Length", "cm", "mm", 1),
    ("Weight", "t", "kg", 3),
    ("Weight", "kg", "g", 3),
    ("Volume", "l", "ml", 3),
)
"""Quantity, given unit, requested unit, and the power of ten between them."""

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Record:
    """A prompt and its exact continuation."""

    task: str
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """Prompt and answer as one text, as in the training data."""
        return f"{self.prompt} {self.answer}\n"


def _field(rng: random.Random) -> tuple[str, str]:
    """A sentence about an order, and one of its fields."""
    values = {
        "name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "city": rng.choice(CITIES),
        "item": rng.choice(ITEMS),
        "count": str(rng.randint(2, 99)),
        "day": rng.choice(DAYS),
    }
    sentence = rng.choice(
        (
            "{name} from {city} ordered {count} {item} on {day}.",
            "On {day} we sent {count} {item} to {name} in {city}.",
            "{count} {item} for {name} arrive in {city} on {day}.",
        )
    )
    asked = rng.choice(sorted(values))
    return f"Text: {sentence.format(**values)}\nField: {asked}\nAnswer:", values[asked]


def _date(rng: random.Random) -> tuple[str, str]:
    """A date in one of several common formats, and the same date as year-month-day."""
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    written = rng.choice(
        (f"{day} {name} {year}", f"{name} {day}, {year}", f"{day} {name[:3]} {year}", f"{day}.{month}.{year}")
    )
    return f"Date: {written}\nFormat: year-month-day\nAnswer:", f"{year}-{month:02d}-{day:02d}"


def _unit(rng: random.Random) -> tuple[str, str]:
    """A decimal quantity, and the same quantity as a whole number of a smaller unit."""
    quantity, given, asked, power = rng.choice(UNITS)
    whole, places = rng.randint(1, 99), rng.randint(1, min(2, power))
    decimals = f"{rng.randrange(10**places):0{places}d}"
    answer = f"{whole}{decimals}{'0' * (power - places)} {asked}"
    return f"{quantity}: {whole}.{decimals} {given}\nUnit: {asked}\nAnswer:", answer


def _wrong(rng: random.Random) -> tuple[str, str]:
    """Three or four records of one kind, and the letter of the only one that breaks an obvious rule."""
    kind = rng.choice(("age", "month", "missing", "hours"))
    letters = "ABCD"[: rng.randint(3, 4)]
    wrong = rng.choice(letters)
    lines = []
    for letter, first in zip(letters, rng.sample(FIRST_NAMES, len(letters)), strict=True):
        bad = letter == wrong
        if kind == "age":
            fact = f"age {rng.randint(200, 999) if bad else rng.randint(18, 99)}"
        elif kind == "month":
            month = rng.randint(13, 99) if bad else rng.randint(1, 12)
            fact = f"born {rng.randint(1950, 2019)}-{month:02d}-{rng.randint(1, 28):02d}"
        elif kind == "missing":
            fact = "city:" if bad else f"city: {rng.choice(CITIES)}"
        else:
            morning, evening = rng.randint(5, 11), rng.randint(13, 20)
            start, end = (evening, morning) if bad else (morning, evening)
            fact = f"from {start:02d}:00 to {end:02d}:00"
        lines.append(f"{letter}: {first}, {fact}\n")
    return f"Which record is wrong?\n{''.join(lines)}Answer:", wrong


def _lookup(rng: random.Random) -> tuple[str, str]:
    """The plan of a working week in one line with a question about one day, and the entry of that day."""
    head, asking, values = rng.choice(
        (("Shifts", "Shift on", FIRST_NAMES), ("Visits", "Visit on", CITIES), ("Sales", "Sale on", ITEMS))
    )
    plan = dict(zip(DAYS[:5], rng.sample(values, 5), strict=True))
    asked = rng.choice(DAYS[:5])
    table = ", ".join(f"{day} {value}" for day, value in plan.items())
    return f"{head}: {table}\n{asking} {asked}", plan[asked]


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "field": _field,
    "date": _date,
    "unit": _unit,
    "wrong": _wrong,
    "lookup": _lookup,
}

TASKS: tuple[str, ...] = tuple(_MAKERS)
"""The names of all tasks."""


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is held out, that is, never used in training."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def records(count: int, seed: int, tasks: Sequence[str] = TASKS, *, held_out: bool = True) -> list[Record]:
    """Return `count` different records, with the tasks in rotation. The same arguments return the same records.

    With `held_out=False`, the records are from the training part. Raises ValueError if a task has no more records.
    """
    rng = random.Random(seed)
    found: list[Record] = []
    seen: set[str] = set()
    misses = 0
    while len(found) < count:
        task = tasks[len(found) % len(tasks)]
        prompt, answer = _MAKERS[task](rng)
        if is_held_out(prompt) == held_out and prompt not in seen:
            seen.add(prompt)
            found.append(Record(task, prompt, answer))
            misses = 0
        elif (misses := misses + 1) > 10_000:
            raise ValueError(
                f"only {len(found)} of {count} records exist: task {task!r} has no more; ask for fewer"
            )
    return found


def is_right(record: Record, completion: str) -> bool:
    """Whether the first line of a completion, without surrounding spaces, is the answer."""
    return completion.split("\n", 1)[0].strip() == record.answer


def accuracy(records: Sequence[Record], completions: Sequence[str]) -> dict[str, float]:
    """The share of correct completions for each task, and for all records as `all`."""
    if len(records) != len(completions):
        raise ValueError(f"{len(records)} records but {len(completions)} completions")
    right: dict[str, list[bool]] = {}
    for record, completion in zip(records, completions, strict=True):
        right.setdefault(record.task, []).append(is_right(record, completion))
    shares = {task: sum(marks) / len(marks) for task, marks in right.items()}
    every = [mark for marks in right.values() for mark in marks]
    return shares | {"all": sum(every) / len(every) if every else 0.0}
