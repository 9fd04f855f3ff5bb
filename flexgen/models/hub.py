"""How a model's files are downloaded from the hub."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HubOptions:
    """Options of a download. A model in a local directory does not use them.

    revision: a branch, a tag or a commit of the repository; None is its main branch.
    token: an access token, True for the one that is stored on this machine, False for none; None sends the stored
        one where there is one.
    cache_dir: the folder of downloaded files; None is the cache of huggingface_hub.
    local_files_only: use the cache only and send no request.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of huggingface_hub's downloads: the options that are given."""
        options = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "local_files_only"
        }
        given = {name: value for name, value in options.items() if value is not None}
        return given | ({"local_files_only": True} if self.local_files_only else {})
