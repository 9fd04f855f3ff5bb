"""Weights in another form than the checkpoint's, in files that are written once and that later runs use again.

The offload directory has a folder for each model, in it one for each state of the checkpoint's files, and in it the
converted files. Next to each is a record with a digest of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from flexgen.errors import FlexGenError
from flexgen.memory.disk_store import DiskStore
from flexgen.models.checkpoint import Checkpoint
from flexgen.quant.codec import ENCODING

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_RECORD = ".json"
_NAME_LIMIT = 80  # characters; file systems take 255 bytes
_DIGITS = 16
_STATE = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


class Conversions:
    """The converted files of one checkpoint.

    A file is used again if it begins as expected and its content has the digest that was recorded when it was
    written. The digest is computed again only if the file's size, times or inode differ from those in the record:
    every write changes at least the ctime, which no program can set. (A write within the same tick of the file
    system's clock, some milliseconds after the file was made, would go unnoticed.)

    While the store is open, no other process removes the files.
    """

    def __init__(self, disk: DiskStore, model: str, checkpoint: Checkpoint) -> None:
        """model: the name of the model, for the folder."""
        self._disk = disk
        self._model, self._state = _model_folder(model, checkpoint), _state_folder(checkpoint)
        self._found: dict[str, Path | None] = {}

    def find(self, name: str, header: bytes, nbytes: int) -> Path | None:
        """The file `name` that an earlier run wrote, or None if there is none or its content is not what was written.

        header, nbytes: how the file must begin, and its size.
        """
        name = f"{self._model}/{self._state}/{name}"
        if name not in self._found:
            self._found[name] = self._verified(name, header, nbytes)
        return self._found[name]

    def write(self, name: str, nbytes: int, write: Callable[[BinaryIO], None]) -> Path:
        """Write the file `name` of `nbytes`: complete, or not at all. Raises as `DiskStore.publish` does."""
        self._disk.use(f"{self._model}/{self._state}", make=True)
        name, digest = f"{self._model}/{self._state}/{name}", ""

        def write_and_digest(file: BinaryIO) -> None:
            nonlocal digest
            write(file)
            file.flush()
            digest = _digest(file)

        path = self._disk.publish(name, write_and_digest, nbytes)
        self._record(name, path, digest)
        self._found[name] = path
        return path

    def remove_stale(self) -> None:
        """Remove what was converted from the same files in an earlier state: these states cannot come back.

        What another process uses stays; a later run removes it.
        """
        for path in self._disk.kept_folders(self._model, _STATE):
            if path.name != self._state and self._disk.remove_unused(path):
                logger.info("removed %s: the checkpoint that it was converted from has changed", path)

    def _verified(self, name: str, header: bytes, nbytes: int) -> Path | None:
        if not self._disk.use(f"{self._model}/{self._state}", make=False):
            return None
        path = self._disk.published(name)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                stamp = _stamp(file)
                if stamp["size"] != nbytes or file.read(len(header)) != header:
                    return None
                record = self._read_record(name)
                digest = record.get("sha256")
                if digest is None or record.get("stamp") != stamp and _digest(file) != digest:
                    logger.warning("%s is not what was written; it is written again", path)
                    return None
        except OSError:
            return None
        if record.get("stamp") != stamp:  # a copy, for example
            with contextlib.suppress(FlexGenError):  # without a new record the next run reads the file again
                self._record(name, path, digest)
        return path

    def _record(self, name: str, path: Path, digest: str) -> None:
        with path.open("rb") as file:
            record = json.dumps({"sha256": digest, "stamp": _stamp(file)}).encode()

        def write(file: BinaryIO) -> None:
            file.write(record)

        self._disk.publish(name + _RECORD, write, len(record))

    def _read_record(self, name: str) -> dict[str, Any]:
        path = self._disk.published(name + _RECORD)
        try:
            record = json.loads(path.read_bytes()) if path else {}
        except (ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}


def converted_bytes(model: str, checkpoint: Checkpoint, offload_dir: str | Path) -> int:
    """Bytes of the files that earlier runs converted from the checkpoint as it is now."""
    folder = Path(offload_dir, _model_folder(model, checkpoint), _state_folder(checkpoint))
    return sum(path.stat().st_size for path in folder.glob("*" + SUFFIX))


def _model_folder(model: str, checkpoint: Checkpoint) -> str:
    """The name is for people: of a long path its end, and never "..". The digits tell apart models of one name."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "--", model)[-_NAME_LIMIT:].strip(".-") or "model"
    return f"{readable}-{_short(chr(0).join(map(str, checkpoint.sources)))}"


def _state_folder(checkpoint: Checkpoint) -> str:
    """The state of the checkpoint and of the codecs, so that what neither has any more is stale."""
    return _short(f"{checkpoint.identity} encoding {ENCODING}")


def _short(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:_DIGITS]


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _stamp(file: BinaryIO) -> dict[str, int]:
    status = os.fstat(file.fileno())
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }
