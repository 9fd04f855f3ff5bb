"""flexgen: run language models that are larger than device memory, at the throughput of the hardware.

from flexgen import OptLM, Policy

with OptLM("demo", Policy(gpu_batch_size=8, weights={"cpu": 50, "disk": 50})) as model:
    ids = model.generate([[5, 6, 7]], max_new_tokens=8)
"""

# ruff: noqa: E402
from flexgen.cli.interrupts import end_quietly_while_starting

end_quietly_while_starting()  # before slow imports

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexgen.engine.model import OptLM
    from flexgen.policy import Auto, Policy, Share, Split, Tier
    from flexgen.runtime.sampler import sample
    from flexgen.runtime.stats import Stats
    from flexgen.workload import Workload

__all__ = ["Auto", "OptLM", "Policy", "Share", "Split", "Stats", "Tier", "Workload", "sample"]

# Modules that FlexGen 0.1 had at the top of its package: flexgen.utils, flexgen.timer, ...
__path__.append(f"{__path__[0]}/flex_opt/old_names")

_MODULES = dict.fromkeys(("Auto", "Policy", "Share", "Split", "Tier"), "flexgen.policy")
_MODULES |= {"OptLM": "flexgen.engine.model", "Stats": "flexgen.runtime.stats"}
_MODULES |= {"sample": "flexgen.runtime.sampler", "Workload": "flexgen.workload"}


def __getattr__(name: str) -> Any:
    # Imported on first use (PEP 562): the list of commands and policies need no torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # collections of the objects that an import makes take time and free nothing
    try:
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    finally:
        if collects:
            gc.enable()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
