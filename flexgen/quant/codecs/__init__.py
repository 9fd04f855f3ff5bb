"""The codecs. Each is one module, with the name that a policy uses and the codec as `CODEC`.

Codecs are found by their files; there is no other list of them.
"""

from __future__ import annotations

from importlib import import_module

from flexgen.policy import CODECS as NAMES
from flexgen.quant.codec import Codec

CODECS: dict[str, Codec] = {
    name: import_module(f"{__name__}.{name}").CODEC for name in NAMES if name != "none"
}
"""All codecs by the names that a policy uses, without "none"."""
