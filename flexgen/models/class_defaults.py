"""The default values of the fields of transformers' config classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig


def class_defaults(kind: type[PreTrainedConfig]) -> Mapping[str, Any]:
    """The fields of a config class, with their defaults.

    Some classes have defaults that contradict each other. The warnings of transformers about these are not shown,
    because they do not concern the user's model.
    """
    logger = logging.getLogger("transformers.configuration_utils")
    before, logger.disabled = logger.disabled, True
    try:
        return vars(kind())
    finally:
        logger.disabled = before
