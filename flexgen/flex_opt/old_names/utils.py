"""FlexGen 0.1 has its environment, tasks and logs here. This module contains only imports."""

from flexgen.flex_opt import (
    GB,
    KB,
    MB,
    BenchmarkResult,
    ExecutionEnv,
    T,
    Task,
    project_decode_latency,
    read_benchmark_log,
    run_cmd,
    str2bool,
    write_benchmark_log,
)

__all__ = [
    "GB",
    "KB",
    "MB",
    "BenchmarkResult",
    "ExecutionEnv",
    "T",
    "Task",
    "project_decode_latency",
    "read_benchmark_log",
    "run_cmd",
    "str2bool",
    "write_benchmark_log",
]
