"""Models whose shape is known by name, for plans and benchmarks without a download."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flexgen.models.families import config_from_dict
from flexgen.models.families.opt import SIZES, known_config

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

_FILE = Path(__file__).with_name("known.toml")

Format = Literal["fp8", "mxfp4 experts"]
"""A format of published weights, see the top of known.toml."""


class Known(NamedTuple):
    """A known model: its repository on the hub, the fields of its config.json that differ from its class, and the
    format of its published weights, if it is not the config's dtype."""

    repository: str
    config: dict[str, Any]
    published: Format | None = None


@cache
def _others() -> dict[str, Known]:
    """The models of `known.toml` by name."""
    return {name: Known(**entry) for name, entry in tomllib.loads(_FILE.read_text(encoding="utf-8")).items()}


@cache
def _repositories() -> dict[str, str]:
    others = {name: known.repository for name, known in _others().items()}
    return {size: f"facebook/{size}" for size in SIZES} | others


@cache
def _names() -> dict[str, str]:
    """Each name in lower case, by itself and by its repository."""
    repositories = _repositories()
    return {name: name for name in repositories} | {
        repository.lower(): name for name, repository in repositories.items()
    }


def known_names() -> tuple[str, ...]:
    """The names of all known models."""
    return tuple(_repositories())


def known_name(model: str) -> str | None:
    """The name in `known_names` of "opt-30b", "facebook/opt-30b" or "OPT-30B"; None for any other text."""
    return _names().get(model.lower())


def known_repository(name: str) -> str:
    """The repository on the hub of a name in `known_names`."""
    return _repositories()[name]


def published_format(name: str) -> Format | None:
    """The format of the published weights of a name in `known_names`; None: the dtype of its config."""
    return None if name in SIZES else _others()[name].published


def config_of(name: str) -> PreTrainedConfig:
    """The config of a name in `known_names`, created without network access."""
    if name in SIZES:
        return known_config(name)
    return config_from_dict({"dtype": "bfloat16", **_others()[name].config}, name)
