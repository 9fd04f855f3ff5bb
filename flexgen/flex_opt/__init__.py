"""The interface of FlexGen 0.1.x on top of this engine, for existing scripts.

    from flexgen.flex_opt import CompressionConfig, ExecutionEnv, OptLM, Policy
    python -m flexgen.flex_opt --model facebook/opt-1.3b --path _DUMMY_ --percent 0 100 100 0 100 0

docs/from-flexgen.md lists what is supported and what is not, and how to migrate. The import warns once that there is
a newer interface.
"""

import sys
import warnings
from types import FrameType

from flexgen.flex_opt.benchmark import (
    GB,
    KB,
    MB,
    BenchmarkResult,
    T,
    add_parser_arguments,
    get_filename,
    get_test_inputs,
    main,
    read_benchmark_log,
    run_cmd,
    run_flexgen,
    str2bool,
    write_benchmark_log,
)
from flexgen.flex_opt.config import OptConfig, get_opt_config
from flexgen.flex_opt.environment import ExecutionEnv, TorchDevice, TorchDisk, TorchMixedDevice
from flexgen.flex_opt.model import OptLM, Task
from flexgen.flex_opt.places import DUMMY_WEIGHT, download_opt_weights
from flexgen.flex_opt.policy import CompressionConfig, Policy
from flexgen.flex_opt.timer import project_decode_latency, timers

__all__ = [
    "DUMMY_WEIGHT",
    "GB",
    "KB",
    "MB",
    "T",
    "BenchmarkResult",
    "CompressionConfig",
    "ExecutionEnv",
    "OptConfig",
    "OptLM",
    "Policy",
    "Task",
    "TorchDevice",
    "TorchDisk",
    "TorchMixedDevice",
    "add_parser_arguments",
    "download_opt_weights",
    "get_filename",
    "get_opt_config",
    "get_test_inputs",
    "main",
    "project_decode_latency",
    "read_benchmark_log",
    "run_cmd",
    "run_flexgen",
    "str2bool",
    "timers",
    "write_benchmark_log",
]


def _warn() -> None:
    """Warn about the newer interface, at the line outside of flexgen that imports this module.

    `stacklevel` could name one of the modules with old names instead, and Python shows a DeprecationWarning only for
    lines of the script itself.
    """
    frame: FrameType | None = sys._getframe()
    passed_through = "flexgen", "flexllmgen", "importlib"
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in passed_through:
        frame = frame.f_back
    if frame is None:
        return
    warnings.warn_explicit(
        "flexgen.flex_opt is the interface of FlexGen 0.1; use flexgen.OptLM and flexgen.Policy instead "
        "(see docs/from-flexgen.md)",
        DeprecationWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
    )


_warn()  # once per process, because the module is imported once
