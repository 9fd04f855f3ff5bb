"""Which tests are slow. Fixtures are in shared_fixtures.py and machines.py."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Files that `make test-fast` leaves out: they run whole models, search policies or compile.
SLOW = (
    "engine/*", "fakecuda/*", "flex_opt/*", "hf/*",
    "test_batch.py", "test_bench.py", "test_catalog.py", "test_complete.py", "test_demo_model.py", "test_docs.py",
    "test_errors.py", "test_gpu_benchmark.py", "cli/test_interrupts.py", "test_imports.py", "test_main.py",
    "test_tune.py",
    "kernels/test_attention.py", "kernels/test_encoded_linear.py", "kernels/test_groupwise*.py",
    "kernels/test_half_linear.py", "kernels/test_heads.py", "kernels/test_lengths.py", "kernels/test_loading.py",
    "kernels/test_sparse_attention.py", "kernels/test_triton_*",
    "layout/test_plan.py", "layout/test_weight_slots.py",
    "memory/test_homes.py", "memory/test_loading.py", "memory/test_stream_lanes.py", "memory/test_weights.py",
    "models/test_cached_specs.py", "models/test_chunks.py", "models/test_known.py", "models/test_layer.py",
    "models/families/test_tables.py",
    "predict/test_cpu_attention.py", "predict/test_costs.py", "predict/test_mixtures.py",
    "predict/test_numbering.py", "predict/test_paper_table.py", "predict/test_prediction.py",
    "predict/test_uneven_layers.py",
    "probe/test_probe.py", "quant/test_codecs.py",
    "runtime/test_executor.py", "runtime/test_kvcache.py", "runtime/test_recorded.py", "runtime/test_sparse.py",
    "schedule/test_orders.py", "search/test_find.py", "search/test_frontier.py",
)  # fmt: skip
FAST = (
    "engine/test_refusals.py", "engine/test_scoring.py", "engine/test_text.py",
    "flex_opt/test_places.py", "flex_opt/test_policy.py", "hf/test_id_cache.py",
    "hf/test_max_memory.py",
)  # fmt: skip
"""Files that match a pattern of SLOW and are run nevertheless."""


def is_slow(path: Path) -> bool:
    name = path.relative_to(TESTS).as_posix()
    return any(fnmatch(name, pattern) for pattern in SLOW) and name not in FAST


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not import the slow files."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py" and is_slow(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before hypothesis looks for the profile of its option
def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and with them torch, transformers and hypothesis.

    Where several workers run the tests, the process that starts them does without.
    """
    runs_tests = config.getoption("dist", "no") == "no"
    if runs_tests or config.getoption("--hypothesis-profile"):
        for plugin in ("machines", "shared_fixtures"):
            config.pluginmanager.import_plugin(plugin)
