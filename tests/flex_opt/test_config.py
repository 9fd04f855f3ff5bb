import dataclasses

import numpy as np
import pytest
import torch
from transformers import OPTForCausalLM

from flexgen.errors import ModelError
from flexgen.flex_opt import OptConfig, get_opt_config
from flexgen.flex_opt.config import is_published, to_transformers
from flexgen.models.families import spec_from_config
from flexgen.models.families.opt import SIZES, known_config


@pytest.mark.parametrize("name", SIZES)
def test_names_and_sizes(name):
    config = get_opt_config(f"facebook/{name}")
    assert config == get_opt_config(name.upper())
    assert config.name == name
    assert (config.num_hidden_layers, config.n_head, config.input_dim) == SIZES[name]
    assert (config.hidden_size, config.ffn_embed_dim) == (config.input_dim, 4 * config.input_dim)
    made, known = to_transformers(config).to_dict(), known_config(name).to_dict()
    assert {key for key in known if made[key] != known[key]} <= {"_name_or_path"}


def test_the_defaults_are_the_smallest_model():
    assert OptConfig() == get_opt_config("opt-125m")


def test_instruction_tuned_and_special_models():
    for name in ("facebook/opt-iml-30b", "facebook/opt-iml-max-30b"):
        config = get_opt_config(name)
        assert dataclasses.replace(config, name="opt-30b") == get_opt_config("opt-30b")
        assert config.name == name.removeprefix("facebook/")
    galactica = get_opt_config("facebook/galactica-30b")
    assert (galactica.vocab_size, to_transformers(galactica).activation_function) == (50000, "gelu")
    assert get_opt_config("opt-175b-stage").num_hidden_layers == 24


def test_fields_may_be_changed():
    config = get_opt_config("opt-1.3b", num_hidden_layers=2, dtype=np.float32)
    assert (config.num_hidden_layers, to_transformers(config).num_hidden_layers) == (2, 2)
    assert spec_from_config(to_transformers(config), "changed").dtype == torch.float32
    assert is_published(get_opt_config("opt-1.3b")) and not is_published(config)
    assert not is_published(OptConfig(name="mine"))


def test_model_bytes_are_those_of_the_weights():
    config = get_opt_config("opt-125m")
    with torch.device("meta"):
        model = OPTForCausalLM(to_transformers(config))
    count = sum(parameter.numel() for parameter in model.parameters())
    # 0.1 leaves out the table of positions.
    positions = model.model.decoder.embed_positions.weight.numel()
    assert config.model_bytes() == pytest.approx(2 * (count - positions), rel=1e-3)


def test_cache_and_hidden_bytes():
    config = get_opt_config("opt-1.3b")
    assert config.hidden_bytes(3, 10) == 3 * 10 * 2048 * 2
    assert config.cache_bytes(3, 10) == 2 * 24 * 3 * 10 * 2048 * 2


def test_unknown_names_and_fields_that_do_not_agree():
    with pytest.raises(ModelError, match=r"opt-31b.*opt-30b.*did you mean 'opt-30b'"):
        get_opt_config("facebook/opt-31b")
    with pytest.raises(TypeError):
        get_opt_config("opt-30b", layers=2)
    with pytest.raises(ModelError, match="layer_norm_eps"):
        to_transformers(get_opt_config("opt-30b", layer_norm_eps=1e-6))
