"""A multimodal checkpoint generates as a text model, with part of each class on each tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multimodal import MULTIMODAL, multimodal_config, multimodal_model

from flexgen.engine.model import OptLM
from flexgen.hf import FlexGenForCausalLM

TOKENS = 10


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_greedy_ids(model_type: str, tmp_path: Path, prompts: Any, mixed: Any) -> None:
    model = multimodal_model(multimodal_config(model_type, *MULTIMODAL[model_type]))
    model.save_pretrained(tmp_path)
    ids = torch.tensor(prompts([6, 6, 6, 6]))
    theirs = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0).numpy()
    with OptLM(tmp_path, mixed(), device="emulated", progress=False) as lm:
        ours = lm.generate(ids.tolist(), TOKENS, stop=())
        assert all(lm.placement.nbytes.values())
    np.testing.assert_array_equal(ours, theirs)
    with FlexGenForCausalLM.from_pretrained(tmp_path, policy=mixed(), device="emulated") as opened:
        again = opened.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(again.numpy(), theirs)
