"""What an import costs: libraries that take seconds are loaded when something needs them, not before."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys

import pytest

import flexgen

HEAVY = ("scipy.optimize", "transformers", "huggingface_hub.errors")
# One process runs all stages in this order, so that torch loads once. The last two load what the others must not.
STAGES = {
    "package": "import flexgen",
    "names": "from flexgen import OptLM, Policy, Workload",
    "engine": "import flexgen.engine.model, flexgen.search.find, flexgen.probe.measured",
    "commands": (
        "import flexgen.bench, flexgen.complete, flexgen.batch; "
        "import flexgen.simulate, flexgen.measure, flexgen.tune"
    ),
    "model": (
        "from transformers import LlamaConfig; from flexgen.models import open_model; "
        "config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1); "
        "spec, _ = open_model(config, 'dummy')"
    ),
    "scipy": "import scipy.optimize",
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The names of all modules that a new process has loaded after each stage."""
    lines = ["import sys"]
    for code in STAGES.values():
        lines += [code, "print(*sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return dict(zip(STAGES, map(str.split, done.stdout.splitlines()), strict=True))


def heavy(modules: list[str]) -> list[str]:
    return [m for m in modules if m in HEAVY or m.startswith(tuple(f"{name}." for name in HEAVY))]


@pytest.mark.parametrize("stage", ["package", "names", "engine", "commands"])
def test_an_import_loads_no_heavy_library(stage: str, loaded: dict[str, list[str]]) -> None:
    assert heavy(loaded[stage]) == []


def test_the_check_finds_loaded_modules(loaded: dict[str, list[str]]) -> None:
    assert "scipy.optimize" in heavy(loaded["scipy"])


def test_opening_a_model_loads_no_modelling_file(loaded: dict[str, list[str]]) -> None:
    assert "transformers.models.llama.configuration_llama" in loaded["model"]
    assert not [name for name in loaded["model"] if "modeling_llama" in name or "modeling_opt" in name]


@pytest.mark.parametrize("enabled", [True, False])
def test_an_import_leaves_the_garbage_collector_as_it_was(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def fail(name: str) -> None:
        seen.append(gc.isenabled())
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError, match="flexgen.engine.model"):
            flexgen.__getattr__("OptLM")
        assert seen == [False] and gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
