"""Options of single prompts, which replace those of the call: how their tokens are chosen, and their stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flexgen.engine.text import stop_strings
from flexgen.errors import RequestError, did_you_mean, shown
from flexgen.runtime.choice import Choice, by_row
from flexgen.runtime.sampler import check_sampling, check_seed

SAMPLING = "temperature", "top_k", "top_p", "seed"
STOP = "stop"

RowOptions = Mapping[str, Any]
"""For one prompt: `temperature` (0 takes the most probable token), `top_k`, `top_p`, `seed` and `stop` (a string or
several). Any of them may be left out."""


def check_options(options: object) -> None:
    """Raise RequestError unless `options` are valid `RowOptions`."""
    if not isinstance(options, Mapping):
        raise RequestError(f"options are {shown(options)}; they must be an object with names and values")
    known = (*SAMPLING, STOP)
    for name in options:
        if name not in known:
            raise RequestError(
                f"option {shown(name)} is not known; known: {', '.join(known)}{did_you_mean(name, known)}"
            )
    check_sampling(options.get("temperature", 0), options.get("top_k", 0), options.get("top_p", 1))
    check_seed(options.get("seed"))
    stop_strings(options.get(STOP, ()))


def check_all(options: Sequence[RowOptions], prompts: int) -> None:
    """Raise RequestError unless there are valid options for each of `prompts` prompts."""
    if len(options) != prompts:
        raise RequestError(
            f"there are options for {len(options)} of {prompts} prompts; give {{}} for no change"
        )
    for row, some in enumerate(options):
        try:
            check_options(some)
        except RequestError as error:
            raise RequestError(f"prompt {row}: {error}") from None


def stops_of(options: Sequence[RowOptions], stop: str | Iterable[str]) -> list[tuple[str, ...]]:
    """The stop strings of each prompt. stop: those of prompts without their own."""
    common = stop_strings(stop)
    return [stop_strings(some[STOP]) if STOP in some else common for some in options]


def choice_of(
    options: Sequence[RowOptions], sampled: Callable[..., Choice], sampling: Mapping[str, Any]
) -> Choice:
    """The choice of tokens of all prompts. `sampled` makes that of one from the arguments of `OptLM.sampled`.

    sampling: the arguments of the call. A prompt with a temperature of its own is sampled if that is above 0.
    """
    made: dict[tuple[Any, ...], Choice] = {}  # prompts with equal options are chosen together
    choices = []
    for some in options:
        own = {name: some[name] for name in SAMPLING if name in some}
        if "temperature" in own:
            own["do_sample"] = own["temperature"] > 0
        key = tuple(sorted(own.items()))
        if key not in made:
            made[key] = sampled(**{**sampling, **own})
        choices.append(made[key])
    return by_row(choices)
