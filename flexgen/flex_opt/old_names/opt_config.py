"""FlexGen 0.1 has `OptConfig`, `get_opt_config` and `download_opt_weights` here."""

from flexgen.flex_opt import OptConfig, download_opt_weights, get_opt_config

__all__ = ["OptConfig", "download_opt_weights", "get_opt_config"]
