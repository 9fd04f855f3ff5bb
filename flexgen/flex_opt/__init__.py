"""The interface of FlexGen 0.1.x, for scripts that were written against it; the engine below is this one.

    from flexgen.flex_opt import CompressionConfig, ExecutionEnv, OptLM, Policy
    python -m flexgen.flex_opt --model facebook/opt-1.3b --path _DUMMY_ --percent 0 100 100 0 100 0

docs/from-flexgen.md says what is kept, what is not, and how to move on. Importing it warns once that there is a
newer interface.
"""

import warnings

from flexgen.flex_opt.benchmark import (
    GB,
    BenchmarkResult,
    add_parser_arguments,
    get_filename,
    get_test_inputs,
    main,
    read_benchmark_log,
    run_flexgen,
    str2bool,
    write_benchmark_log,
)
from flexgen.flex_opt.config import OptConfig, get_opt_config
from flexgen.flex_opt.environment import ExecutionEnv, TorchDevice, TorchDisk, TorchMixedDevice
from flexgen.flex_opt.model import OptLM, Task
from flexgen.flex_opt.places import DUMMY_WEIGHT
from flexgen.flex_opt.policy import CompressionConfig, Policy

__all__ = [
    "DUMMY_WEIGHT",
    "GB",
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
    "get_filename",
    "get_opt_config",
    "get_test_inputs",
    "main",
    "read_benchmark_log",
    "run_flexgen",
    "str2bool",
    "write_benchmark_log",
]

# A module is imported once in a process, so this is said once, and of the line that imports it.
warnings.warn(
    "flexgen.flex_opt keeps scripts of FlexGen 0.1 running; new ones use flexgen.OptLM and flexgen.Policy "
    "(docs/from-flexgen.md says how to move)",
    DeprecationWarning,
    stacklevel=2,
)
