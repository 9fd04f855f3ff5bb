"""Opening a model: limits of memory as accelerate writes them, and what a pipeline looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.errors import CapacityError, RequestError
from flexgen.hf import FlexGenForCausalLM
from flexgen.hf.max_memory import read_max_memory
from flexgen.policy import Policy, Tier


def test_max_memory_is_read_as_accelerate_writes_it() -> None:
    given = {0: "10GiB", "cpu": "64GB", "disk": 5_000}
    assert read_max_memory(given) == {Tier.GPU: 10 << 30, Tier.CPU: 64 * 10**9, Tier.DISK: 5_000}
    assert read_max_memory({1: "1KiB"}, "cuda:1,memory=2GiB") == {Tier.GPU: 1024}
    assert read_max_memory({"cuda:0": 7}, "cuda") == {Tier.GPU: 7}
    assert read_max_memory(None) is None
    for wrong, words in (
        ({1: "1GiB"}, "key 1"),
        ({"gpu": 1}, "key 'gpu'"),
        ({True: 1}, "key True"),
        ({"cpu": "much"}, r"max_memory\['cpu'\]"),
        ({"cpu": None}, r"max_memory\['cpu'\]"),
        ("10GiB", "write a dict"),
    ):
        with pytest.raises(RequestError, match=words):
            read_max_memory(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "tier"), [(0, "gpu"), ("cpu", "cpu"), ("disk", "disk")])
def test_a_limit_holds_for_opening_and_for_calls(key: Any, tier: str, saved: Any, inputs: Any) -> None:
    everything = {tier: 100}
    policy = Policy(gpu_batch_size=4, weights=everything, cache=everything, activations=everything)
    made, given = saved("llama"), inputs([9, 9, 9, 9])
    with made.open(policy, max_memory={key: "1GiB"}) as model:
        model.generate(**given, max_new_tokens=4)
        call = model.lm.stats.plan
    counted = call.on(Tier(tier)) - (call.on(Tier.DISK, "weights") if tier == "disk" else 0)
    with made.open(policy, max_memory={key: counted}) as model:
        model.generate(**given, max_new_tokens=4)
    with (
        made.open(policy, max_memory={key: counted - 1}) as model,
        pytest.raises(CapacityError, match=f"on the {tier} tier"),
    ):
        model.generate(**given, max_new_tokens=4)
    if tier != "disk":
        with pytest.raises(CapacityError, match=f"on the {tier} tier"):
            made.open(policy, max_memory={key: "1KiB"})


def test_offload_folder_holds_what_is_on_disk(saved: Any, inputs: Any, tmp_path: Any) -> None:
    policy = Policy(gpu_batch_size=2, weights={"disk": 100})
    # Of a float32 checkpoint: its own files do not hold the weights as they are needed.
    with saved("llama").open(policy, dtype="bfloat16", offload_folder=tmp_path) as model:
        model.generate(**inputs([3]), max_new_tokens=2)
        assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_a_pipeline_looks_at(saved: Any) -> None:
    made = saved("llama", "bfloat16")
    with made.open(dtype="auto") as model:
        assert isinstance(model, FlexGenForCausalLM) and not isinstance(model, torch.nn.Module)
        assert model.device == torch.device("cpu") and model.dtype == torch.bfloat16
        assert model.config.model_type == "llama" and model.generation_config.eos_token_id == 1
        assert model.name_or_path == str(made.directory)
        assert model.can_generate() and model.main_input_name == "input_ids"
        assert model.eval() is model and model.train(False) is model
        assert model.to("cpu") is model and model.to(device="cpu", dtype=torch.bfloat16) is model
        for elsewhere in ("cuda:0", torch.float32):
            with pytest.raises(NotImplementedError, match="policy"):
                model.to(elsewhere)
        with pytest.raises(NotImplementedError, match="train"):
            model.train()
    with pytest.raises(RequestError, match="closed"):
        model(torch.tensor([[5, 6]]))


def test_a_model_without_a_generation_config(saved: Any, inputs: Any, tmp_path: Any) -> None:
    made = saved("llama")
    for path in made.directory.iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    given, new = inputs([4, 6]), dict(max_new_tokens=20, do_sample=False)
    with FlexGenForCausalLM.from_pretrained(tmp_path, Policy(gpu_batch_size=2), "cpu") as model:
        assert model.generate(**given, **new).tolist() == made.reference.generate(**given, **new).tolist()
