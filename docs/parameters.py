"""For `make docs`: shows the parameters of a docstring as a list.

Docstrings are Markdown, except for the lines that describe parameters: `seed: of the draws`, continued by indented
lines.
"""

import re
from typing import Any

import griffe

_PARAMETER = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): ")


class Parameters(griffe.Extension):
    """Writes `- **seed**: of the draws` for such a line."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """The docstring with a Markdown list in place of the lines that describe parameters."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        if found := _PARAMETER.match(line):
            if not in_list:
                lines.append("")
            lines.append(f"- **{found[1]}**: {line[found.end() :]}")
            in_list = True
        else:
            in_list = in_list and line.startswith(" ")
            lines.append(line)
    return "\n".join(lines)
