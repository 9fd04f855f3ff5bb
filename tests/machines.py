"""Machines and tiny models that the planner's tests share."""

import pytest
from transformers import LlamaConfig, OPTConfig

from flexgen.predict.hardware import Hardware

RATES = {"float32": 1e9}

CONFIGS = {
    "opt": OPTConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=192,
        max_position_embeddings=4096, word_embed_proj_dim=64, dtype="float32",
    ),
    "opt untied, projected": OPTConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=192,
        max_position_embeddings=4096, word_embed_proj_dim=32, do_layer_norm_before=False, tie_word_embeddings=False,
        dtype="float32",
    ),
    "llama, grouped": LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=4096, dtype="float32",
    ),
}  # fmt: skip


def _machine(**changes) -> Hardware:
    """A GPU of round figures, emulated on the host's cores, with changes."""
    fields = dict(
        name="round",
        capacity={"gpu": 10**12, "cpu": 10**12, "disk": 10**12},
        bandwidth={"to_device": 1e6, "from_device": 1e6, "disk_read": 5e5, "disk_write": 2e5, "host": 4e6},
        products={"float32": [[8, 1e9]]},
        prefill_attention=RATES,
        device_attention={"float32": 1e8, "int4": 5e7, "int8": 5e7},
        host_attention={"float32": 1e7, "int4": 5e6, "int8": 5e6},
        decoding={"int4": 1e8, "int8": 1e8},
        computes_in={"float16": "float32"},
        fixed={"cell": 1e-4, "stage": 1e-5, "disk_job": 1e-4},
    )
    return Hardware(**fields | changes)


def _host(**changes) -> Hardware:
    """The same without a GPU."""
    return _machine(**dict(name="host", capacity={"cpu": 10**12, "disk": 10**12}) | changes)


@pytest.fixture(scope="session")
def configs():
    return CONFIGS


@pytest.fixture(scope="session")
def machine():
    return _machine


@pytest.fixture(scope="session")
def host():
    return _host
