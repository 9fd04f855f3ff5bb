"""Downloads from the hub: their options, and the files of a repository that a model needs."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from flexgen.errors import ModelError, did_you_mean, shown
from flexgen.models.folders import GGUF_SUFFIX, SHARD, first_files
from flexgen.models.known import known_names

_TEXT_FILES = [
    "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "*_tokens*.json",
    "chat_template*", "*.model", "*.tiktoken", "tekken.json",
]  # fmt: skip
_SUBDIRECTORIES = ["*/*"]
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
"""Weights by format. Only the first format that a repository has is downloaded."""
_MOST_NAMED = 8
"""The most files that a message names."""


@dataclass(frozen=True)
class HubOptions:
    """Options for downloads. They have no effect on a model in a local directory.

    revision: a branch, a tag or a commit of the repository. None: the main branch.
    token: an access token. True: the token stored on this machine. False: no token. None: the stored token if there
        is one.
    cache_dir: the folder for downloaded files. None: the cache of huggingface_hub.
    local_files_only: use only the cache and send no request.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def arguments(self) -> dict[str, Any]:
        """The options that are set, as keyword arguments of huggingface_hub's download functions."""
        options = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "local_files_only"
        }
        given = {name: value for name, value in options.items() if value is not None}
        return given | ({"local_files_only": True} if self.local_files_only else {})


def split_file(name: str) -> tuple[str, str | None]:
    """The hub id and the GGUF file in "org/model-GGUF:Q4_K_M"; the name and None if it has no such part."""
    repository, colon, file = name.partition(":")
    return (repository, file) if colon and repository.count("/") == 1 else (name, None)


def download_config(repository: str, hub: HubOptions) -> Path:
    """Download config.json and return its directory. Raises ModelError."""
    return Path(_ask(repository, huggingface_hub.hf_hub_download, hub, filename="config.json")).parent


def download(repository: str, hub: HubOptions) -> Path:
    """Download a model and return the directory with its config, tokenizer and weights in one format.

    If the only weights of the repository are GGUF files of one model, this is the path of the first file.

    Raises ModelError for an unknown repository, and for GGUF files of several models.
    """
    for weights in _WEIGHTS:
        patterns = [*_TEXT_FILES, weights]
        snapshot = Path(
            _ask(
                repository,
                huggingface_hub.snapshot_download,
                hub,
                allow_patterns=patterns,
                ignore_patterns=_SUBDIRECTORIES,
            )
        )
        if any(file.match(weights) for file in snapshot.iterdir()):
            return snapshot
    names = _gguf_names(repository, hub)
    return _fetched(repository, _only(repository, first_files(names)), names, hub) if names else snapshot


def download_gguf(repository: str, file: str, hub: HubOptions) -> Path:
    """Download a GGUF file and return its path, or that of the first file if the model is in several files.

    file: the name of the file, or the end of it before ".gguf", such as "Q4_K_M", in upper or lower case.

    Raises ModelError for an unknown repository, and unless exactly one model has this name.
    """
    names = _gguf_names(repository, hub)
    firsts = first_files(names)
    found = [name for name in firsts if file in (name, PurePosixPath(name).name)]
    end = re.compile(rf"(.*[-._])?{re.escape(file)}", re.IGNORECASE)
    found = found or [name for name in firsts if end.fullmatch(_stem(name))]
    if not found:
        has = f"its GGUF files: {_listed(firsts)}" if firsts else "it has no GGUF files"
        raise ModelError(f"{repository} has no GGUF file {shown(file)}; {has}")
    return _fetched(repository, _only(repository, found), names, hub)


def _gguf_names(repository: str, hub: HubOptions) -> list[str]:
    """The GGUF files of a repository; if the hub cannot be reached, those in the cache."""
    from huggingface_hub.errors import HFValidationError

    snapshot = huggingface_hub.snapshot_download
    if not hub.local_files_only:
        try:
            found = snapshot(repository, **hub.arguments(), allow_patterns=[f"*{GGUF_SUFFIX}"], dry_run=True)
            return sorted(file.filename for file in found)
        except (OSError, HFValidationError):
            pass  # the request below raises the error, unless the repository is in the cache
    directory = Path(_ask(repository, snapshot, hub, allow_patterns=[]))
    return sorted(str(file.relative_to(directory)) for file in directory.rglob(f"*{GGUF_SUFFIX}"))


def _only(repository: str, firsts: list[str]) -> str:
    """The only name of a list. Raises ModelError if there are several."""
    if len(firsts) > 1:
        example = f"{repository}:{_stem(firsts[0])}"
        raise ModelError(
            f"{repository} has several GGUF files: add the name of one to the id, for example {example!r}. The "
            f"files: {_listed(firsts)}"
        )
    return firsts[0]


def _fetched(repository: str, name: str, names: list[str], hub: HubOptions) -> Path:
    """The path of the file `name`, after a download of all files of its model."""
    match = SHARD.fullmatch(name)
    shards = [
        each for each in names if match and (one := SHARD.fullmatch(each)) and one["stem"] == match["stem"]
    ]
    patterns = [glob.escape(each) for each in shards or [name]]
    return Path(_ask(repository, huggingface_hub.snapshot_download, hub, allow_patterns=patterns)) / name


def _stem(name: str) -> str:
    """The name of a file without its folder, the number of its part, and the suffix."""
    file = PurePosixPath(name).name
    match = SHARD.fullmatch(file)
    return match["stem"] if match else file.removesuffix(GGUF_SUFFIX)


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _ask(repository: str, download: Any, hub: HubOptions, **options: Any) -> str:
    """One request to the hub or its local cache. Raises ModelError, with the hub's own message."""
    # Imports an HTTP client, which takes a tenth of the time of flexgen's import.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(download(repository, **hub.arguments(), **options))
    except HFValidationError as error:
        reason = "neither a local directory nor a hub id"
        raise ModelError(f"{repository}: {reason}{_similar(repository)}: {error}") from error
    except LocalEntryNotFoundError as error:
        reason = "not a local directory, and the hub cannot be reached"
        raise ModelError(f"{repository}: {reason}{_similar(repository)}: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = "not a local directory, and the hub reports"
        raise ModelError(f"{repository}{_similar(repository)}: {reason}: {error}") from error


def _similar(name: str) -> str:
    return did_you_mean(name.removeprefix("facebook/").lower(), ("demo", *known_names()))
