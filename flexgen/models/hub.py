"""Options for downloads from the hub."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


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
