"""Every architecture of GGUF files against transformers, and metadata that are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import FILES, Tiny, tiny, write_gguf

from flexgen.errors import ModelError
from flexgen.models import open_model
from flexgen.models.gguf_architectures import ARCHITECTURES
from flexgen.models.gguf_files import DECODED

IDS = torch.randint(4, 60, (3, 14), generator=torch.Generator().manual_seed(1))
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
STARTS = [0] * len(IDS)
VARIANTS = [(architecture, number) for architecture, files in FILES.items() for number in range(len(files))]


def test_every_architecture_has_tiny_files() -> None:
    assert sorted(ARCHITECTURES) == sorted(FILES)


def test_the_documentation_lists_every_architecture_and_type() -> None:
    (about,) = re.findall(r"\n## GGUF files\n(.*?)\n## ", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    for architecture in ARCHITECTURES:
        assert f"`{architecture}`" in about
    for kind in DECODED:
        assert kind in about or kind in ("Q3_K", "Q4_K", "Q5_K")  # "Q2_K to Q6_K"


@pytest.mark.parametrize(("architecture", "number"), VARIANTS)
def test_logits_equal_transformers(architecture: str, number: int, tmp_path: Path, runner: Any) -> None:
    model = tiny(FILES[architecture][number])
    theirs = model(IDS).logits
    assert theirs.std() > 0.05
    opened = runner(write_gguf(tmp_path / "model.gguf", architecture, model), torch.float32)
    torch.testing.assert_close(opened.full(IDS, STARTS), theirs, rtol=0, atol=1e-4)
    assert opened.spec.dtype == torch.float32


def test_the_factors_of_llama_3_divide_the_frequencies(tmp_path: Path) -> None:
    """Conversion stores them in a tensor in place of the config's rope_scaling."""
    rope = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=16)
    scaled = tiny(Tiny("llama", 1), rope_parameters=rope)
    plain = tiny(Tiny("llama", 1), rope_parameters=dict(rope_type="default", rope_theta=500.0))
    theirs = scaled.model.rotary_emb.inv_freq
    factors = (plain.model.rotary_emb.inv_freq / theirs).numpy()
    path = write_gguf(tmp_path / "model.gguf", "llama", plain, tensors={"rope_freqs.weight": factors})
    spec, _ = open_model(path)
    (ours,) = {layer.attention.rope.inv_freq for layer in spec.layers if layer.attention.rope}
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_ids_that_end_a_text(tmp_path: Path) -> None:
    model = tiny(Tiny("llama"))
    changes = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2}
    spec, _ = open_model(write_gguf(tmp_path / "model.gguf", "llama", model, changes=changes))
    assert spec.eos_token_ids == (2, 9) and spec.bos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "general.architecture = 'mamba' is not supported .*supported: arcee, ",
        ),
        ({"llama.new_kind": "x"}, "llama.new_kind = 'x' is not supported: flexgen does not know this key"),
        ({"llama.block_count": None}, "the metadata have no llama.block_count"),
        (
            {"llama.block_count": 0},
            "llama.block_count = 0 is not supported; it must be one size for all layers",
        ),
        ({"llama.attention.head_count": [4, 2, 4]}, r"head_count = \(4, 2, 4\) is not supported"),
        ({"llama.attention.key_length": "x"}, "llama.attention.key_length = 'x' is not supported"),
        ({"llama.attention.value_length": 8}, "keys and values of different sizes"),
        ({"llama.rope.scaling.type": "new"}, "rope.scaling.type = 'new' is not supported; supported: none, "),
        ({"llama.rope.freq_base": -1.0}, "rope_parameters = .* is invalid"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "have no llama.attention.layer_norm_rms_epsilon"),
    ],
)
def test_metadata_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tiny(Tiny("llama")), changes=changes)
    with pytest.raises(ModelError, match=message):
        open_model(path)
