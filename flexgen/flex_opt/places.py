"""The search for the weights of a model under the `path` argument of FlexGen 0.1."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig

from flexgen.demo import MODEL_DIR
from flexgen.errors import CheckpointError, ModelError, UnsupportedError, cut, did_you_mean
from flexgen.flex_opt.config import KNOWN, OptConfig, from_spec, get_opt_config, is_published, to_transformers
from flexgen.models import ModelSpec, open_model
from flexgen.models.tensor_files import NumpyCheckpoint

_log = logging.getLogger("flexgen")

DUMMY_WEIGHT = "_DUMMY_"
"""A path with this word in it asks for random weights."""
_DEMO = "demo"
"""The name of the embedded model, as in flexgen's other commands. It needs no path."""


@dataclass(frozen=True)
class Found:
    """The arguments `model` and `weights` of `flexgen.OptLM`."""

    model: str | Path | PreTrainedConfig
    weights: Literal["checkpoint", "dummy"] | Path


def read_config(config: str | OptConfig, path: str) -> OptConfig:
    """The sizes of a model by name: a published OPT, the embedded "demo", or a directory of that name in Hugging
    Face's layout, which is `path` itself or is in it. Raises ModelError, with a similar name, for an unknown one."""
    if isinstance(config, OptConfig):
        return config
    try:
        return get_opt_config(config)
    except ModelError:
        name = config.rpartition("/")[2]
        directory = _named_directory(name, path)
        if directory is None:
            raise ModelError(_unknown(config, path)) from None
    return from_spec(_opt_spec(directory), name)


def _named_directory(name: str, path: str) -> Path | None:
    directory = None if DUMMY_WEIGHT in path else _hf_directory(name, path)
    # A mistyped name must not open a model with another name in `path`.
    if directory is not None and directory.name == name:
        return directory
    return MODEL_DIR if name == _DEMO else None


def _unknown(name: str, path: str) -> str:
    """The message for a name that is neither a known name nor a directory in `path`."""
    found = () if DUMMY_WEIGHT in path else sorted(p.parent.name for p in _base(path).glob("*/config.json"))
    similar = did_you_mean(name.rpartition("/")[2].lower(), (_DEMO, *KNOWN, *found))
    here = f"; in {path}: {cut(', '.join(found))}" if found else ""
    return (
        f"{cut(name)}: there is no OPT model of this name; known: {', '.join((_DEMO, *KNOWN))}{here}{similar}"
    )


def find_weights(config: OptConfig, path: str) -> Found:
    """Find the weights of `config`. The places are searched in this order:

    1. `path` with _DUMMY_ in it: random weights
    2. `path/<name>-np`: 0.1's folder of numpy files
    3. `path/<name>`, then `path`: directories in Hugging Face's layout
    4. for "demo", the embedded model
    5. for a published model, the hub; this is logged as a warning

    Raises CheckpointError, with the searched places, if there are none, and ModelError if a directory contains a
    model of other sizes.
    """
    if DUMMY_WEIGHT in path:
        return Found(to_transformers(config), "dummy")
    folder = _base(path) / f"{config.name}-np"
    if (folder / NumpyCheckpoint.MARK).exists():
        return Found(to_transformers(config), folder)
    directory = _hf_directory(config.name, path) or _named_directory(config.name, path)
    if directory is not None:
        _check_sizes(config, directory)
        return Found(directory, "checkpoint")
    looked_for = (
        f"{config.name}: there are no weights under {path}: looked for {folder / NumpyCheckpoint.MARK}, "
        f"{_base(path) / config.name / 'config.json'} and {_base(path) / 'config.json'}"
    )
    if not is_published(config):
        raise CheckpointError(f"{looked_for}; use the path {DUMMY_WEIGHT} for random weights")
    repository = f"facebook/{config.name}"
    _log.warning("%s; looking for %s on the hub", looked_for, repository)
    try:
        _, checkpoint = open_model(repository)
    except ModelError as error:
        raise CheckpointError(f"{looked_for}; {error}") from error
    return Found(checkpoint.directory or repository, "checkpoint")


def download_opt_weights(model_name: str, path: str) -> None:
    """Raises UnsupportedError. 0.1 converted a model of the hub to numpy files under `path`, which is not needed."""
    name = model_name.rpartition("/")[2]
    raise UnsupportedError(
        "weights need no conversion to numpy files: flexgen reads checkpoints directly. "
        f"Run: hf download facebook/{name} --local-dir {_base(path) / name}; or just open the model, which downloads "
        "it to the hub's cache"
    )


def _base(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _hf_directory(name: str, path: str) -> Path | None:
    base = _base(path)
    # Unlike Path.exists, os.path.exists returns False for a name that is too long.
    return next((d for d in (base / name, base) if os.path.exists(d / "config.json")), None)


def _check_sizes(config: OptConfig, directory: Path) -> None:
    found = from_spec(_opt_spec(directory), config.name)
    for field in ("num_hidden_layers", "input_dim", "n_head", "ffn_embed_dim", "vocab_size", "max_seq_len"):
        ours, theirs = getattr(config, field), getattr(found, field)
        if ours != theirs:
            raise ModelError(
                f"{directory} contains a model with {field} = {theirs}, but {config.name} has {ours}; "
                f"give the path of {config.name}"
            )


def _opt_spec(directory: Path) -> ModelSpec:
    spec, _ = open_model(directory, "dummy")
    if spec.family != "opt":
        raise ModelError(
            f"{directory} contains a model of family {spec.family}; this interface supports only OPT: "
            "open the model with flexgen.OptLM"
        )
    return spec
