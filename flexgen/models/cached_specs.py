"""The specs of configs that were read before, in the user's cache.

transformers supplies the fields that a config.json leaves out. Its import takes a second and 70 MB of memory. A
cached spec makes it unnecessary. A spec depends on the contents of config.json, on the version of transformers and on
the source of this package, so these are the key of an entry.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flexgen import formats
from flexgen.formats import block_fp8, fp4, integers
from flexgen.kernels import scoring
from flexgen.models import families, mlp_spec, norm_spec, sources
from flexgen.models import spec as spec_module
from flexgen.models.families import config_from_dict, spec_from_config
from flexgen.models.spec import ModelSpec
from flexgen.user_cache import cache_folder, keep

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_MODULES = {
    module.__name__: module
    for module in (spec_module, mlp_spec, norm_spec, sources, scoring, block_fp8, fp4, integers)
}
"""The modules with the classes of specs and of their parts."""


def read_spec(values: dict[str, Any], name: str) -> tuple[ModelSpec, bool]:
    """The spec for the contents of a config.json, and whether they have a dtype.

    name: the name of the model for the spec and for messages.

    Raises ModelError.
    """
    path = _path(values)
    if (known := _known(path)) is not None:
        spec, has_dtype = known
        return replace(spec, name=name), has_dtype
    config = config_from_dict(values, name)
    found = spec_from_config(config, name), config.dtype is not None
    try:
        keep(path, pickle.dumps(found))
    except OSError as error:
        logger.debug("cannot cache the spec of %s: %s", name, error)
    return found


def _path(values: Mapping[str, Any]) -> Path:
    parts = version("transformers"), torch.__version__, _source(), json.dumps(values, sort_keys=True)
    digest = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
    return cache_folder("specs") / digest[:32]


def _source() -> str:
    """A digest of the source files that make specs: this package, formats, and families from elsewhere."""
    digest = hashlib.sha256(Path(scoring.__file__).read_bytes())
    for folder in (_PACKAGE, *map(Path, (*formats.__path__, *families.__path__))):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _known(path: Path) -> tuple[ModelSpec, bool] | None:
    """The cached result at `path`; None if there is none, or if it is damaged."""
    try:
        found = _Plain(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged data can raise anything
        logger.debug("%s is damaged, and is written again: %s", path, error)
        return None
    match found:
        case (ModelSpec() as spec, bool(has_dtype)):
            return spec, has_dtype
    return None


class _Plain(pickle.Unpickler):
    """An unpickler for specs. It calls nothing but the classes of specs and of their parts."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr({"torch": torch, **_MODULES}.get(module), name, None)
        own = isinstance(found, type) and found.__module__ in _MODULES
        if own or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not a part of a spec")
