"""The package name of FlexGen since 2024. It is installed as `flexllmgen`, and its modules are flexgen's."""

import importlib
import sys

# Registered under both names, so that both imports return the same classes.
for _module in ("flex_opt", "compression", "opt_config", "pytorch_backend", "timer", "utils"):
    sys.modules[f"{__name__}.{_module}"] = globals()[_module] = importlib.import_module(f"flexgen.{_module}")
