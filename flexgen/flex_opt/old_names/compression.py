"""FlexGen 0.1 has `CompressionConfig` here."""

from flexgen.flex_opt import CompressionConfig

__all__ = ["CompressionConfig"]
