"""The codecs: one module each, whose name is the codec's name in a policy, with the codec itself as `CODEC`.

A codec is found by its file: nothing else lists it.
"""

from __future__ import annotations

from importlib import import_module

from flexgen.policy import CODECS as NAMES
from flexgen.quant.codec import Codec

CODECS: dict[str, Codec] = {
    name: import_module(f"{__name__}.{name}").CODEC for name in NAMES if name != "none"
}
"""All codecs by the names that a policy uses; "none" is the absence of one."""
