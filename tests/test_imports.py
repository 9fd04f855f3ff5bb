"""The cost of imports: slow libraries are loaded only when they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("scipy.optimize", "transformers")


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Modules of these names, or below them, that a new process has loaded after `code`."""
    show = f"print([m for m in sys.modules if m.startswith({tuple(f'{n}.' for n in names)}) or m in {names}])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; {show}"], capture_output=True, text=True, check=True
    )
    found: list[str] = eval(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import flexgen",
        "from flexgen import OptLM, Policy, Workload",
        "import flexgen.engine.model, flexgen.search.find, flexgen.probe.measured",
        "import flexgen.bench, flexgen.complete, flexgen.batch, flexgen.simulate, flexgen.measure, flexgen.tune",
    ],
)
def test_an_import_loads_neither_transformers_nor_scipy(code: str) -> None:
    assert loaded_by(code, HEAVY) == []


def test_the_check_finds_loaded_modules() -> None:
    assert "scipy.optimize" in loaded_by("import scipy.optimize", HEAVY)


def test_opening_a_model_loads_no_modelling_file() -> None:
    code = (
        "from transformers import LlamaConfig; from flexgen.models import open_model; "
        "config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1); "
        "spec, _ = open_model(config, 'dummy')"
    )
    loaded = loaded_by(code, ("transformers",))
    assert "transformers.models.llama.configuration_llama" in loaded
    assert not [name for name in loaded if "modeling_llama" in name or "modeling_opt" in name]
