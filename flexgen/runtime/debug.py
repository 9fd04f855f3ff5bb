"""Debug modes of `generate`: times projected from a few tokens, and the cost of each operation."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen.errors import RequestError, shown
from flexgen.results.trace import Event, LaneName, Phase
from flexgen.runtime.call import Timing
from flexgen.runtime.request import check_whole
from flexgen.schedule.orders import normal
from flexgen.schedule.steps import Op
from flexgen.units import format_seconds

FEWER_BATCH = "fewer_batch"
BREAKDOWN = "breakdown"
_MODES = (None, BREAKDOWN, FEWER_BATCH)

_FEW_TOKENS = 4
"""The prefill, a first decode token, whose caches may be cold, and two more."""


def tokens_to_run(
    max_new_tokens: int, cut_gen_len: int | None, debug_mode: str | None, projected: bool = False
) -> int:
    """The number of new tokens that a call runs.

    projected: whether figures for all tokens are needed. Raises RequestError for an invalid mode or `cut_gen_len`.
    """
    if not isinstance(debug_mode, str | None) or debug_mode not in _MODES:
        raise RequestError(
            f"debug_mode is {shown(debug_mode)}; it must be None, 'breakdown' or 'fewer_batch'"
        )
    if cut_gen_len is None:
        return min(max_new_tokens, _FEW_TOKENS) if debug_mode else max_new_tokens
    check_whole("cut_gen_len", cut_gen_len, 1)
    if projected and cut_gen_len == 1 < max_new_tokens:
        raise RequestError(
            f"cut_gen_len is 1: the decode of {shown(max_new_tokens)} new tokens cannot be projected from a prefill "
            "alone. Give at least 2, or ask for 1 new token if you need only the prefill"
        )
    return min(cut_gen_len, max_new_tokens)


def order_to_run(debug_mode: str | None) -> str | None:
    """For a breakdown, the order without overlap, in which no operation slows another one down; otherwise None."""
    return normal.name if debug_mode == BREAKDOWN else None


def projected_decode(timing: Timing, asked: int) -> float | None:
    """The projected seconds of the decode for `asked` new tokens of each block, or None if no block ran more than its
    first token."""
    later = sum(ran - 1 for ran in timing.ran)
    return timing.decode * len(timing.ran) * (asked - 1) / later if later else None


def cost_table(events: Iterable[Event]) -> dict[tuple[Phase, Op, LaneName], tuple[int, float]]:
    """(events, seconds) of each operation on each lane, prefill before decode."""
    table: dict[tuple[Phase, Op, LaneName], tuple[int, float]] = {}
    for event in events:
        key = (Phase.DECODE if event.step.token > 0 else Phase.PREFILL), event.step.op, event.lane
        count, seconds = table.get(key, (0, 0.0))
        table[key] = count + 1, seconds + event.end - event.start
    order = list(Phase)
    return dict(sorted(table.items(), key=lambda row: order.index(row[0][0])))


def summary(
    timing: Timing, num_prompts: int, new_tokens: int, tokens: int, asked: int, debug_mode: str | None
) -> str:
    """A readable summary of a call that ran `tokens` of the `asked` tokens. A breakdown includes the cost table."""
    decode = f"decode {format_seconds(timing.decode)}"
    if tokens < asked:
        seconds = projected_decode(timing, asked)
        projected = (
            seconds is not None and f"{format_seconds(seconds)} (projected from {max(timing.ran)} tokens)"
        )
        decode = f"decode {projected or 'unknown: one token is not enough for a projection'}"
    lines = [
        f"{num_prompts} prompts, {new_tokens} new tokens: prefill {format_seconds(timing.prefill)}, {decode}"
    ]
    if debug_mode == BREAKDOWN:
        for (phase, op, lane), (count, seconds) in cost_table(timing.trace.events).items():
            lines.append(
                f"{phase:<9}{op.name.lower():<15}{lane:<12}{count:>7} x {format_seconds(seconds / count):>9} "
                f"= {format_seconds(seconds)}"
            )
    return "\n".join(lines)
