"""Find a model by name, path or hub id, and open its checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor

from flexgen.demo import MODEL_DIR
from flexgen.errors import MOST_OF_PATH, CheckpointError, ModelError, shown, shown_path
from flexgen.formats import Encoding
from flexgen.models.bin_files import BinCheckpoint
from flexgen.models.build import build_layers
from flexgen.models.cached_specs import read_spec
from flexgen.models.dummy import DummyCheckpoint
from flexgen.models.embed import Head, InputEmbed
from flexgen.models.families import spec_from_config
from flexgen.models.fields import token_ids
from flexgen.models.folders import GGUF_SUFFIX, check_folder, only_gguf, other_format, shard_path
from flexgen.models.gguf_families import spec_from_gguf
from flexgen.models.gguf_files import GGUFCheckpoint
from flexgen.models.gguf_header import all_shards, read_headers
from flexgen.models.hub import HubOptions, download, download_config, download_gguf, split_file
from flexgen.models.known import config_of, known_name, known_repository, published_format
from flexgen.models.layer import Layer
from flexgen.models.plain_files import reading
from flexgen.models.published import ENCODINGS
from flexgen.models.spec import EncodedWeight, ModelSpec, WeightSpec
from flexgen.models.tensor_files import Extent, NumpyCheckpoint, SafetensorsCheckpoint
from flexgen.models.tied_head import has_own_values

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

__all__ = ["Checkpoint", "Extent", "open_model"]

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_NUMPY_SUFFIX = "-np"
"""The end of the name of FlexGen 0.1's folder for a model, after the name of the model."""

_Files = SafetensorsCheckpoint | BinCheckpoint | NumpyCheckpoint | GGUFCheckpoint


class Checkpoint(Protocol):
    """A source of weights."""

    @property
    def directory(self) -> Path | None:
        """The directory of the tokenizer, or a GGUF file that contains it; None for a model without one."""

    @property
    def sources(self) -> Sequence[Path]:
        """The files of the weights, sorted; empty if there are no files."""

    @property
    def identity(self) -> str:
        """A key for the state of the files. Data derived from them is valid as long as it is the same."""

    @property
    def fingerprint(self) -> str:
        """A digest that differs between models and is equal for copies of the same weights.

        It is computed from headers and samples of the values, and takes about as long as opening the files.
        """

    def encoded(self, weight: WeightSpec) -> EncodedWeight | None:
        """The tensors of a weight that is stored quantized; None for other weights.

        Raises CheckpointError if one of the tensors is missing or has the wrong shape or dtype.
        """

    def extent(self, weight: WeightSpec) -> Extent | None:
        """The place of the weight's bytes in a file.

        None if they cannot be read in place (`.bin`, dummy), or if the weight is stored quantized: then each of its
        tensors has an extent.
        """

    def read(self, weight: WeightSpec, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        """A new contiguous host tensor: the whole weight, or a range of rows of its first dimension.

        dtype: the dtype of the model. A weight with a dtype of its own is returned in that. A weight that is stored
        quantized is decoded completely, also for a few rows.

        Raises CheckpointError, also for values that are not finite.
        """

    def verify(self, layers: Sequence[Layer]) -> None:
        """Raises CheckpointError unless every weight exists, with its shape and a floating-point dtype."""


def open_model(
    model: str | Path | PreTrainedConfig,
    weights: Literal["checkpoint", "dummy"] | Path = "checkpoint",
    hub: HubOptions | None = None,
) -> tuple[ModelSpec, Checkpoint]:
    """Open a model and return its spec and its checkpoint.

    model: "demo", a directory in Hugging Face's layout, a GGUF file or a directory with one, a known name
        ("opt-30b"), a hub id, a hub id with a GGUF file ("org/model-GGUF:Q4_K_M") or a transformers config. A
        directory of FlexGen 0.1 ("opt-30b-np") is accepted too if it has a known name.
    weights: "checkpoint", "dummy" for random weights, or the `Path` of the directory with the weights of `model`.
    hub: options of downloads.

    Only a hub id uses the network; with "dummy", only for its config.json. The function reads headers but no weights,
    with one exception: if a file has both an embedding and a head that the config calls tied, it compares the two. It
    remembers the result for files that do not change.

    Raises ModelError and CheckpointError.
    """
    hub = HubOptions() if hub is None else hub
    if not isinstance(hub, HubOptions):
        raise ModelError(f"hub is {shown(hub)}; it must be HubOptions(...) or None")
    if isinstance(weights, Path):
        spec, _ = open_model(model, "dummy", hub)
        directory = weights.expanduser()
        if not os.path.isdir(directory):
            raise CheckpointError(f"weights is {shown_path(weights)}: there is no such directory")
        files = _open_files(directory, spec.encodings)
        unsaid = _is_config(model) and model.dtype is None
        return _as_stored(spec, files, unsaid), files
    if not isinstance(weights, str) or weights not in ("checkpoint", "dummy"):
        raise ModelError(
            f"weights = {shown(weights)} is not supported; supported: 'checkpoint', 'dummy', a Path of a directory"
        )
    dummy = weights == "dummy"
    if _is_config(model):
        if not dummy:
            raise ModelError(
                "a config has no weights: give the directory or hub id of the model, weights=Path(directory) or "
                "weights='dummy'"
            )
        return _dummy(spec_from_config(model, model.name_or_path or model.model_type))
    if not isinstance(model, str | Path):
        raise ModelError(
            f"model is a {type(model).__name__}; give a name, a directory or a transformers config"
        )
    name, directory = str(model), Path(model).expanduser()
    if name == "demo":
        return _open_directory(MODEL_DIR, name, dummy)
    # Unlike the methods of Path, these functions return False for a name that is too long.
    if os.path.isdir(directory):
        return _open_directory(directory, name, dummy)
    known = known_name(name)
    if known is not None and dummy:
        spec, form = spec_from_config(config_of(known), known), published_format(known)
        return _dummy(replace(spec, encodings=(ENCODINGS[form],)) if form else spec)
    if os.path.exists(directory) and directory.suffix == GGUF_SUFFIX:
        return _open_gguf(directory, name, dummy)
    if os.path.exists(directory):
        other = other_format(directory.parent) if directory.suffix != ".safetensors" else ""
        fix = other or f"give the directory that contains it and {_CONFIG}"
        raise ModelError(f"{shown_path(name)} is a file; {fix}")
    if isinstance(model, Path) or directory.is_absolute() or name.startswith((".", "~")):
        raise _missing(name)
    return _open_from_hub(name, dummy, hub)


def _missing(name: str) -> ModelError:
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not name.endswith(GGUF_SUFFIX):
        return ModelError(f"{shown_path(name)}: there is no such directory")
    hint = f". For a file on the hub, write {owner}/{repository}:{file}" if owner.strip(".~") and file else ""
    return ModelError(f"{shown_path(name)}: there is no such file{hint}")


def _open_from_hub(name: str, dummy: bool, hub: HubOptions) -> tuple[ModelSpec, Checkpoint]:
    """Open the model of a hub id or a known name. A name with more parts is meant as a path."""
    repository, file = split_file(name)
    if repository.count("/") > 1 or (file is None and name.endswith(GGUF_SUFFIX)):
        raise _missing(name)
    if len(name) > MOST_OF_PATH:  # the hub's own message would contain all of it
        raise ModelError(
            f"{shown(name)}: neither a local directory nor a hub id, which has at most 96 characters"
        )
    if file is not None:
        if dummy:
            raise ModelError(
                f"{name}: with weights='dummy' no GGUF file is downloaded. Give the hub id of the original model or "
                "a known name"
            )
        return _open_gguf(download_gguf(repository, file, hub), name, dummy)
    known = known_name(name)
    repository = name if known is None else known_repository(known)
    place = download_config(repository, hub) if dummy else download(repository, hub)
    return (_open_gguf if place.suffix == GGUF_SUFFIX else _open_directory)(place, name, dummy)


def _is_config(model: Any) -> TypeGuard[PreTrainedConfig]:
    if isinstance(model, str | Path):
        return False
    from transformers import PreTrainedConfig  # already imported if the caller has a config

    return isinstance(model, PreTrainedConfig)


def _open_gguf(path: Path, name: str, dummy: bool) -> tuple[ModelSpec, Checkpoint]:
    header = read_headers(all_shards(path))
    spec = spec_from_gguf(header, name)
    if dummy:
        return _dummy(spec, path)
    files = GGUFCheckpoint(path, header)
    return _as_stored(spec, files, False), files


def _open_directory(directory: Path, name: str, dummy: bool) -> tuple[ModelSpec, Checkpoint]:
    if (gguf := only_gguf(directory)) is not None:
        return _open_gguf(gguf, name, dummy)
    check_folder(directory, _CONFIG)
    numpy = (directory / NumpyCheckpoint.MARK).exists()
    known = known_name(directory.name.removesuffix(_NUMPY_SUFFIX)) if numpy else None
    if known is not None:
        config = config_of(known)
        spec, has_dtype = spec_from_config(config, name), config.dtype is not None
    else:
        spec, has_dtype = read_spec(_read_json(directory / _CONFIG), name)
    if (directory / _GENERATION).exists():
        generation = _read_json(directory / _GENERATION)
        ids = generation.get("eos_token_id")
        if ids is not None:
            ids = token_ids(ids, f"{name}, {_GENERATION}", "eos_token_id", spec.vocab_size)
            spec = replace(spec, eos_token_ids=ids)
    if dummy:
        return _dummy(spec, directory)
    files = _open_files(directory, spec.encodings)
    return _as_stored(spec, files, not has_dtype), files


def _as_stored(spec: ModelSpec, files: _Files, dtype_unsaid: bool) -> ModelSpec:
    """The spec, completed from the files: the dtype if the config has none, whether the head is tied, and which
    matrices are quantized."""
    files.check_unquantized()
    files.check_depth(spec)
    embed, head = _vocabulary(spec)
    if dtype_unsaid and files.holds(embed) and not files.encoded(embed):
        spec = replace(spec, dtype=files.dtype_of(embed))
    if spec.tied_head and files.holds(embed) and files.holds(head) and has_own_values(files, embed, head):
        spec = replace(spec, tied_head=False)
    return _with_encoded(spec, files)


def _with_encoded(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """The spec with the matrices that the checkpoint stores quantized."""
    if not spec.encodings:
        return spec
    weights = (weight for layer in build_layers(spec) for weight in layer.weights)
    found = {weight.key: checkpoint.encoded(weight) for weight in weights}
    return replace(spec, encoded={key: encoded for key, encoded in found.items() if encoded is not None})


def _dummy(spec: ModelSpec, directory: Path | None = None) -> tuple[ModelSpec, Checkpoint]:
    checkpoint = DummyCheckpoint(directory, spec.encodings)
    return _with_encoded(spec, checkpoint), checkpoint


def _vocabulary(spec: ModelSpec) -> tuple[WeightSpec, WeightSpec]:
    """The embedding and the LM head, each with its own names."""
    untied = replace(spec, tied_head=False)
    ends = (InputEmbed(untied), "embed.weight"), (Head(untied), "head.weight")
    embed, head = (next(w for w in layer.weights if w.name == name) for layer, name in ends)
    return embed, head


def _read_json(path: Path, error_class: type[ModelError | CheckpointError] = ModelError) -> dict[str, Any]:
    if not path.exists() and not path.is_symlink():
        raise ModelError(f"{path.parent}: there is no {path.name} in this directory")
    with reading(path):
        data = path.read_bytes()
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise error_class(f"{path} contains a {type(values).__name__}; expected an object")
    return values


def _open_files(directory: Path, encodings: Sequence[Encoding]) -> _Files:
    formats: tuple[tuple[str, type[SafetensorsCheckpoint] | type[BinCheckpoint]], ...] = (
        ("model.safetensors", SafetensorsCheckpoint),
        ("pytorch_model.bin", BinCheckpoint),
    )
    if (directory / NumpyCheckpoint.MARK).exists():
        return NumpyCheckpoint(directory)
    looked_for = []
    for single, checkpoint in formats:
        index = directory / f"{single}.index.json"
        if (directory / single).exists() or (directory / single).is_symlink():
            return checkpoint(directory, [directory / single], encodings)
        if index.exists() or index.is_symlink():
            return checkpoint(directory, _shards(index), encodings)
        looked_for += [single, index.name]
    fix = other_format(directory) or "Use weights='dummy' for random weights"
    raise CheckpointError(
        f"{directory}: there are no weight files; looked for {', '.join(looked_for)}, {NumpyCheckpoint.MARK}. {fix}"
    )


def _shards(index: Path) -> list[Path]:
    """The files named by an index. Their headers tell which tensors they contain."""
    names = _read_json(index, CheckpointError).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map: it is damaged; download it again")
    files = sorted({shard_path(index, name) for name in names.values()})
    missing = [file.name for file in files if not file.exists() and not file.is_symlink()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: files in {index.name} are missing: {', '.join(missing)}; download them again"
        )
    return files
