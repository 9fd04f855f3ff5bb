"""The format of the commands' help texts."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.HelpFormatter):
    """Appends the default to the help of each option that has one, unless the text names it already.

    An option without a value (a switch) and an option that is off by default (None, []) have no default to show.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        is_switch = action.nargs == 0
        if is_switch or default in (None, [], argparse.SUPPRESS) or "(default: " in text:
            return text
        words = map(str, default) if isinstance(default, list) else [str(default)]
        shown = " ".join(words).replace("%", "%%")
        return f"{text} (default: {shown})".lstrip()
