"""The search for weights under `path`, and its errors."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flexgen.demo import MODEL_DIR
from flexgen.errors import CheckpointError, ModelError
from flexgen.flex_opt import OptLM, get_opt_config
from flexgen.flex_opt.places import find_weights, read_config
from flexgen.models.tensor_files import NumpyCheckpoint

PROMPTS = [[5, 6, 7], [8, 9, 10]]


def test_numpy_files_come_first(tiny, tmp_path):
    shutil.copytree(tiny.hf / "opt-tiny", tmp_path / "opt-tiny")
    assert find_weights(tiny.config, str(tmp_path)).model == tmp_path / "opt-tiny"
    assert find_weights(tiny.config, str(tmp_path / "opt-tiny")).model == tmp_path / "opt-tiny"
    shutil.copytree(tiny.path / "opt-tiny-np", tmp_path / "opt-tiny-np")
    assert find_weights(tiny.config, str(tmp_path)).weights == tmp_path / "opt-tiny-np"


@pytest.mark.parametrize("place", ["np", "hf", "hf itself", "home"])
def test_all_places_hold_the_same_model(place, tiny, env, policy, monkeypatch):
    path = {"np": tiny.path, "hf": tiny.hf, "hf itself": tiny.hf / "opt-tiny", "home": "~/np"}[place]
    monkeypatch.setenv("HOME", str(tiny.path.parent))
    out = OptLM(tiny.config, env, str(path), policy(0, 50, 0, 100, 0, 100)).generate(PROMPTS, 6)
    np.testing.assert_array_equal(out, tiny.greedy(PROMPTS, 6))


def test_a_directory_may_name_a_model_that_is_not_known(tiny, env, policy):
    model = OptLM("me/opt-tiny", env, tiny.hf, policy())
    assert dataclasses.replace(model.config, dtype=tiny.config.dtype) == tiny.config
    np.testing.assert_array_equal(model.generate(PROMPTS, 3), tiny.greedy(PROMPTS, 3))
    with pytest.raises(ModelError, match="known: demo, opt-125m"):
        OptLM("opt-other", env, "_DUMMY_", policy())


def test_random_weights_need_no_files(env, policy):
    config = get_opt_config("opt-125m", num_hidden_layers=1, input_dim=32, n_head=2, vocab_size=50)
    out = OptLM(config, env, "_DUMMY_", policy()).generate(PROMPTS, 2)
    assert out.shape == (2, 5)


def test_a_missing_directory_names_the_searched_places(tiny, env, policy, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        OptLM(tiny.config, env, str(tmp_path / "no"), policy())
    base = tmp_path / "no"
    for place in ("opt-tiny-np/decoder.embed_tokens.weight", "opt-tiny/config.json", "config.json"):
        assert str(base / place) in str(caught.value)
    assert "_DUMMY_" in str(caught.value)


def test_a_published_model_is_asked_of_the_hub_and_that_is_said(env, policy, tmp_path, monkeypatch, caplog):
    asked = []

    def unreachable(repository, **options):
        asked.append(repository)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"opt-1\.3b-np.*cannot be reached"):
        OptLM("facebook/opt-1.3b", env, str(tmp_path), policy())
    assert asked == ["facebook/opt-1.3b"]
    assert "looking for facebook/opt-1.3b on the hub" in caplog.text


def test_a_model_from_the_hub_is_opened(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny.hf / "opt-tiny"))
    assert find_weights(get_opt_config("opt-125m"), str(tmp_path)).model == tiny.hf / "opt-tiny"


def test_a_model_of_other_sizes_is_refused(tiny, tmp_path):
    other = dataclasses.replace(tiny.config, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"num_hidden_layers = 2, but opt-tiny has 3"):
        find_weights(other, str(tiny.hf))
    config = tmp_path / "config.json"
    shutil.copy(tiny.hf / "opt-tiny" / "config.json", config)
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"family llama.*flexgen\.OptLM"):
        read_config(tmp_path.name, str(tmp_path))
    with pytest.raises(ModelError, match="known: demo, opt-125m"):
        read_config("another-name", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("dmo", "demo"), ("opt-126m", "opt-125m"), ("facebook/opt-31b", "opt-30b"), ("opt-tny", "opt-tiny")],
)
def test_a_name_that_is_like_a_known_one_or_a_directory_gets_a_hint(name, meant, tiny):
    with pytest.raises(ModelError, match=rf"^{name}: .*; in .*: opt-tiny \(did you mean '{meant}'\?\)$"):
        read_config(name, str(tiny.hf))


def test_a_name_that_is_like_no_other_gets_none(tmp_path):
    with pytest.raises(ModelError) as caught:
        read_config("x" * 1000, str(tmp_path))
    assert "did you mean" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("path", ["empty", "_DUMMY_"])
def test_the_embedded_model_needs_no_files(path, env, policy, tmp_path):
    model = OptLM("demo", env, path if path == "_DUMMY_" else str(tmp_path / path), policy())
    assert model.config.name == "demo" and model.config.max_seq_len == 512
    assert (model.engine.tokenizer_dir == MODEL_DIR) == (path == "empty")
    assert model.generate([[5, 6, 7]], 2).shape == (1, 5)


def test_a_numpy_folder_with_a_tensor_missing(tiny, env, policy, tmp_path):
    shutil.copytree(tiny.path / "opt-tiny-np", tmp_path / "opt-tiny-np")
    (tmp_path / "opt-tiny-np" / "decoder.layers.1.fc2.bias").unlink()
    with pytest.raises(CheckpointError, match=r"1 tensor missing: model\.decoder\.layers\.1\.fc2\.bias"):
        OptLM(tiny.config, env, str(tmp_path), policy())
    assert NumpyCheckpoint.MARK == "decoder.embed_tokens.weight"
