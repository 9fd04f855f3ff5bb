"""A config that was read before is not read with transformers again."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from flexgen.errors import ModelError
from flexgen.models import cached_specs

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setattr(cached_specs, "cache_folder", lambda kind: tmp_path / kind)
    return tmp_path / "specs"


@pytest.fixture
def reads(monkeypatch):
    """The configs that were read with transformers."""
    seen = []
    config_from_dict = cached_specs.config_from_dict

    def spy(values, name):
        seen.append(dict(values))
        return config_from_dict(values, name)

    monkeypatch.setattr(cached_specs, "config_from_dict", spy)
    return seen


def test_the_second_time_gives_the_same_spec_without_transformers(folder, reads):
    first, has_dtype = cached_specs.read_spec(CONFIG, "one")
    second, again = cached_specs.read_spec(CONFIG, "two")
    assert len(reads) == 1 and has_dtype is again is True
    assert first.name == "one" and second.name == "two"
    assert second == first.__class__(**{**vars(first), "name": "two"})
    assert second.dtype is torch.bfloat16
    # Layers that share a spec still do: plans ask one of them for all.
    assert len({id(layer) for layer in second.layers}) == len({id(layer) for layer in first.layers}) == 1


def test_a_config_without_a_dtype_says_so(folder):
    values = {field: value for field, value in CONFIG.items() if field != "dtype"}
    assert [cached_specs.read_spec(values, "one")[1] for _ in range(2)] == [False, False]


def test_another_config_and_another_version_are_read(folder, reads, monkeypatch):
    cached_specs.read_spec(CONFIG, "one")
    assert cached_specs.read_spec({**CONFIG, "hidden_size": 64}, "one")[0].hidden_size == 64
    monkeypatch.setattr(cached_specs, "version", lambda package: "0.0")
    cached_specs.read_spec(CONFIG, "one")
    monkeypatch.setattr(cached_specs, "_source", lambda: "other source")
    cached_specs.read_spec(CONFIG, "one")
    assert len(reads) == 4


def test_an_invalid_config_raises_every_time(folder):
    for _ in range(2):
        with pytest.raises(ModelError, match="hidden_act"):
            cached_specs.read_spec({**CONFIG, "hidden_act": "unknown"}, "one")
    assert not folder.exists()


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize(
    "data",
    [b"", b"no pickle", pickle.dumps(["neither"]), pickle.dumps(_Runs()), pickle.dumps((None, True))],
    ids=["empty", "damaged", "other data", "code", "no spec"],
)
def test_damaged_files_are_written_again_and_run_nothing(data, folder, reads, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cached_specs.read_spec(CONFIG, "one")
    (path,) = folder.iterdir()
    good = path.read_bytes()
    path.write_bytes(data)
    assert cached_specs.read_spec(CONFIG, "one")[0].hidden_size == 32
    assert len(reads) == 2 and path.read_bytes() == good
    assert not (tmp_path / "made").exists()


def test_a_cache_that_cannot_be_written_changes_nothing(monkeypatch, tmp_path, reads):
    (tmp_path / "specs").write_text("a file")
    monkeypatch.setattr(cached_specs, "cache_folder", lambda kind: tmp_path / kind)
    for _ in range(2):
        assert cached_specs.read_spec(CONFIG, "one")[0].hidden_size == 32
    assert len(reads) == 2


def test_a_process_that_opens_a_known_config_does_not_import_transformers(tmp_path):
    code = (
        "import json, sys; from flexgen.models.cached_specs import read_spec; "
        f"read_spec({CONFIG!r}, 'one'); print('transformers' in sys.modules)"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        ).stdout
        for _ in range(2)
    ]
    assert [line.strip() for line in said] == ["True", "False"]
