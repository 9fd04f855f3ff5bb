"""Checks of model directories: folders with something else, and the file names in an index."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from flexgen.errors import CheckpointError, ModelError, shown
from flexgen.models.plain_files import explaining

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_CACHED = "models--"
"""The prefix of a model's folder in the hub's cache."""


_HUB_FORMAT = "the repository of the original model usually has it in Hugging Face's layout"
_OTHER_FORMATS = {
    "*.gguf": ("the GGUF format", "give this file as the model, because it contains the config too"),
    "consolidated*.pth": (
        "Meta's own layout",
        "convert it with transformers' convert_llama_weights_to_hf script, or download the -hf repository",
    ),
    "*.onnx": ("the ONNX format", _HUB_FORMAT),
    "tf_model.h5": ("TensorFlow's format", "load it with transformers and call save_pretrained"),
    "flax_model.msgpack": (
        "Flax's format",
        "load it with transformers and call save_pretrained",
    ),
}
"""Weights in formats of other programs, by the pattern of their file names."""

_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "decoder.*")
"""Weights that are opened before GGUF files in the same folder."""

GGUF_SUFFIX = ".gguf"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of one of the GGUF files of a model in several files."""


def shard_path(index: Path, name: object) -> Path:
    """The file `name` of `index`, in its directory or in a folder below it.

    Raises CheckpointError for a name that leaves the directory. Links are not followed, because files in the hub's
    cache are links out of their folder.
    """
    pure = PurePosixPath(name) if isinstance(name, str) else None
    if pure is None or not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in str(pure):
        raise CheckpointError(
            f"{index}: weight_map contains {shown(name)}; expected the name of a file in {index.parent}"
        )
    return index.parent / pure


def other_format(directory: Path) -> str:
    """A message for weights in a format that flexgen does not support, with the fix; "" if there are none."""
    for pattern, (kind, fix) in _OTHER_FORMATS.items():
        if found := sorted(path.name for path in directory.glob(pattern)):
            return f"{found[0]} is in {kind}, which is not supported: {fix}"
    return ""


def only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a folder without other weights; None if there is none.

    Of a model in several files, it is the first one. Files of vision models (mmproj) do not count. Raises ModelError
    if there are several models, CheckpointError if the folder cannot be listed.
    """
    with explaining(directory):
        if any(file for pattern in _WEIGHTS for file in directory.glob(pattern)):
            return None
        found = sorted(path.name for path in directory.glob("*.gguf") if not _is_vision(path.name))
    firsts = first_files(found)
    if len(firsts) > 1:
        raise ModelError(
            f"{directory} has several GGUF files: give the path of one, for example {directory / firsts[0]}. The "
            f"others are {', '.join(firsts[1:6])}"
        )
    return next((directory / name for name in firsts or found), None)


def first_files(names: Iterable[str]) -> list[str]:
    """The GGUF files to open: of a model in several files the first one, and none of vision models (mmproj)."""
    numbers = {name: SHARD.fullmatch(name) for name in names if not _is_vision(PurePosixPath(name).name)}
    return [name for name, match in numbers.items() if not match or int(match["number"]) == 1]


def _is_vision(name: str) -> bool:
    return name.startswith("mmproj")


def check_folder(directory: Path, config: str) -> None:
    """Raises ModelError for a folder without a file `config` that is a LoRA adapter, an entry of the hub's cache or
    has weights of another program. Warns if there is an adapter next to a model, because it is not applied."""
    has_config = (directory / config).exists()
    if (directory / _ADAPTER).exists():
        if has_config:
            logger.warning(
                "%s also contains a LoRA adapter (%s), which is not applied. To use it, merge it into the model with "
                "peft's merge_and_unload()",
                directory,
                _ADAPTER,
            )
            return
        raise ModelError(
            f"{directory} contains a LoRA adapter{_base(directory / _ADAPTER)}, not a model. Merge it into its base "
            "model with peft's merge_and_unload(), save the result, and give the directory of the result"
        )
    if not has_config and (other := other_format(directory)):
        raise ModelError(f"{directory}: there is no {config} in this directory. {other}")
    if not has_config and directory.name.startswith(_CACHED) and (directory / "snapshots").is_dir():
        model = directory.name.removeprefix(_CACHED).replace("--", "/")
        found = sorted(str(each) for each in (directory / "snapshots").iterdir() if (each / config).exists())
        snapshots = f" or one of its snapshots: {', '.join(found)}" if found else ""
        raise ModelError(
            f"{directory} is an entry of the hub's cache, not a model directory. Give the model's id, {model!r},"
            f"{snapshots}".rstrip(",")
        )


def _base(path: Path) -> str:
    """ " for <base model>", from an adapter's config; "" if it names none."""
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f" for {shown(base)}" if isinstance(base, str) else ""
