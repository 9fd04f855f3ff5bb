"""FlexGen 0.1 has `OptConfig` and `get_opt_config` here."""

from flexgen.flex_opt import OptConfig, get_opt_config

__all__ = ["OptConfig", "get_opt_config"]
