"""Values as messages show them. They come from callers and files, and may be of any size, depth or type."""

from __future__ import annotations

import reprlib
from typing import Any

MOST_CHARACTERS = 200
"""Of a value, in a message."""
_MOST_BITS = 128
"""Of a whole number that is shown in digits. Python refuses to write more than 4300 digits of one."""


class _Repr(reprlib.Repr):
    """`repr` that stops after a few entries of a collection and a few levels of nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8
        self.maxstring = self.maxother = MOST_CHARACTERS // 2

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _MOST_BITS:
            return f"about {'-' if x < 0 else ''}2**{x.bit_length() - 1}"
        return repr(x)

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """In the order of the dict; reprlib would sort the keys."""
        if level <= 0 and x:
            return "{...}"
        pairs: list[str] = []
        for key, value in x.items():
            if len(pairs) == self.maxdict:
                pairs.append("...")
                break
            pairs.append(f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}")
        return "{" + ", ".join(pairs) + "}"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            if type(x).__module__ == "numpy" and not x.shape:
                return self.repr1(x.item(), level)  # 96, not np.int64(96)
            text = repr(x)
        except Exception:  # a class of the caller may raise anything, and deep nesting raises RecursionError
            return f"<{type(x).__name__}>"
        return cut(text, self.maxother)


_repr = _Repr()


def shown(value: object) -> str:
    """`repr(value)` in at most `MOST_CHARACTERS` characters and "..."; never raises an Exception."""
    try:
        return cut(_repr.repr(value))
    except Exception:  # reprlib chooses by the name of the type, which another type can have too
        return f"<{cut(type(value).__name__)}>"


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text`, or its first `most` characters and "..."."""
    return text if len(text) <= most else f"{text[:most]}..."
