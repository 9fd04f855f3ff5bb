"""Where the weights of a model lie under the `path` that FlexGen 0.1 is given."""

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
"""In a path: random weights."""
_DEMO = "demo"
"""The embedded model, as in flexgen's other commands. It needs no path."""


@dataclass(frozen=True)
class Found:
    """What `flexgen.OptLM` is asked to open: its `model` and its `weights`."""

    model: str | Path | PreTrainedConfig
    weights: Literal["checkpoint", "dummy"] | Path


def read_config(config: str | OptConfig, path: str) -> OptConfig:
    """The sizes of a model by name: OPT's own, the embedded "demo", or of the directory of that name, in Hugging
    Face's layout, that is `path` or is in it. Raises ModelError, with a similar name that is known."""
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
    # A model that `path` holds under another name is not what a mistyped name meant.
    if directory is not None and directory.name == name:
        return directory
    return MODEL_DIR if name == _DEMO else None


def _unknown(name: str, path: str) -> str:
    """The message for a name that is neither a known one nor that of a directory in `path`."""
    found = () if DUMMY_WEIGHT in path else sorted(p.parent.name for p in _base(path).glob("*/config.json"))
    similar = did_you_mean(name.rpartition("/")[2].lower(), (_DEMO, *KNOWN, *found))
    here = f"; in {path}: {cut(', '.join(found))}" if found else ""
    return f"{cut(name)}: no OPT model of this name; known: {', '.join((_DEMO, *KNOWN))}{here}{similar}"


def find_weights(config: OptConfig, path: str) -> Found:
    """The weights of `config`, looked for in this order:

    `path` with _DUMMY_ in it (random ones), `path/<name>-np` (0.1's folder of numpy files), `path/<name>` and
    `path` (directories in Hugging Face's layout), for "demo" the embedded model. A published model that is in none
    of them is asked of the hub, which is logged as a warning.

    Raises CheckpointError with what was looked for, ModelError where a directory holds a model of other sizes.
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
        f"{config.name}: no weights under {path}: looked for {folder / NumpyCheckpoint.MARK}, "
        f"{_base(path) / config.name / 'config.json'} and {_base(path) / 'config.json'}"
    )
    if not is_published(config):
        raise CheckpointError(f"{looked_for}; the path {DUMMY_WEIGHT} runs the model with random weights")
    repository = f"facebook/{config.name}"
    _log.warning("%s; asking the hub for %s", looked_for, repository)
    try:
        _, checkpoint = open_model(repository)
    except ModelError as error:
        raise CheckpointError(f"{looked_for}; {error}") from error
    return Found(checkpoint.directory or repository, "checkpoint")


def download_opt_weights(model_name: str, path: str) -> None:
    """0.1 wrote a model of the hub to `path` as numpy files. Raises UnsupportedError: there is nothing to convert."""
    name = model_name.rpartition("/")[2]
    raise UnsupportedError(
        "weights are not converted to numpy files: a checkpoint is read as it is. "
        f"Run: hf download facebook/{name} --local-dir {_base(path) / name}; or open the model without it, which "
        "downloads to the hub's own cache"
    )


def _base(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _hf_directory(name: str, path: str) -> Path | None:
    base = _base(path)
    # Unlike Path.exists, False for a name that is longer than a file may have.
    return next((d for d in (base / name, base) if os.path.exists(d / "config.json")), None)


def _check_sizes(config: OptConfig, directory: Path) -> None:
    found = from_spec(_opt_spec(directory), config.name)
    for field in ("num_hidden_layers", "input_dim", "n_head", "ffn_embed_dim", "vocab_size", "max_seq_len"):
        ours, theirs = getattr(config, field), getattr(found, field)
        if ours != theirs:
            raise ModelError(
                f"{directory} holds a model with {field} = {theirs}, {config.name} has {ours}; "
                "give the path of its own directory"
            )


def _opt_spec(directory: Path) -> ModelSpec:
    spec, _ = open_model(directory, "dummy")
    if spec.family != "opt":
        raise ModelError(
            f"{directory} holds a model of family {spec.family}; this interface knows OPT only: "
            "open others with flexgen.OptLM"
        )
    return spec
