"""Opening a model: memory limits in accelerate's form, and the attributes that a pipeline reads."""

from __future__ import annotations

import gc
import inspect
import json
import threading
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from flexgen.errors import CapacityError, RequestError
from flexgen.hf import FlexGenForCausalLM
from flexgen.hf.max_memory import read_max_memory
from flexgen.policy import Policy, Tier


def test_max_memory_is_read_as_accelerate_writes_it() -> None:
    def limits(given: Any, device: str = "emulated") -> Any:
        return read_max_memory(given, device)[1]

    given = {0: "10GiB", "cpu": "64GB", "disk": 5_000}
    assert limits(given) == {Tier.GPU: 10 << 30, Tier.CPU: 64 * 10**9, Tier.DISK: 5_000}
    # Its units: a small i is binary, a small b is a bit.
    sizes = {"1.5GiB": 3 << 29, "2mib": 2 << 20, "3KB": 3000, "8Gb": 10**9, "16kb": 2000, "7": 7}
    for size, count in sizes.items():
        assert limits({"cpu": size}) == {Tier.CPU: count}
    assert limits({1: "1KiB"}, "cuda:1,memory=2GiB") == {Tier.GPU: 1024}
    assert limits({"cuda:0": 7}, "cuda") == {Tier.GPU: 7}
    assert limits({0: 0}, "cuda") == {Tier.GPU: 0}
    assert limits({0: 0, 1: 9}, "cuda:1") == {Tier.GPU: 9}
    assert limits({3: 7, "cpu": 8}, "cpu") == {Tier.CPU: 8}
    for nothing in (None, {}):
        assert read_max_memory(nothing, "cuda:1") == ("cuda:1", None)
        assert read_max_memory(nothing) == ("auto", None)
    for wrong, words in (
        ({1: "1GiB"}, "max_memory has GPU 1.* here on 0"),
        ({-1: "1GiB"}, "key -1"),
        ({"gpu": 1}, "key 'gpu'"),
        ({True: 1}, "key True"),
        ({"cpu": "much"}, r"max_memory\['cpu'\]"),
        ({"cpu": None}, r"max_memory\['cpu'\]"),
        ("10GiB", "write a dict"),
    ):
        with pytest.raises(RequestError, match=words):
            limits(wrong)


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({0: "10GiB", "cpu": "64GiB"}, "cuda:0"),
        ({2: "10GiB"}, "cuda:2"),
        ({0: 0, 1: "10GiB"}, "cuda:1"),
        ({"cpu": "64GiB"}, "cpu"),
        ({0: "0GiB", "cpu": "64GiB", "disk": "1TB"}, "cpu"),
    ],
)
def test_a_gpu_that_max_memory_leaves_out_is_not_used(given: Any, device: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_max_memory(given, "auto")[0] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read_max_memory(given, "auto")[0] == device
    assert read_max_memory({"cpu": 1}, "cuda") == ("cuda", {Tier.CPU: 1})  # an explicit device is not changed
    with pytest.raises(RequestError, match="max_memory has GPU 4"):
        read_max_memory({3: 1, 4: 1}, "auto")


def test_nothing_but_a_path_is_needed(saved: Any, inputs: Any) -> None:
    made, given, new = saved("opt"), inputs([3, 7]), dict(max_new_tokens=6, do_sample=False)
    expected = ["path_or_id", "policy", "device", "dtype", "offload_folder", "max_memory"]
    parameters = inspect.signature(FlexGenForCausalLM.from_pretrained).parameters
    assert list(parameters)[: len(expected)] == expected
    assert [parameters[name].default for name in expected[1:]] == ["auto"] * 3 + [None] * 2
    with FlexGenForCausalLM.from_pretrained(str(made.directory)) as model:
        assert model.lm.auto is not None and model.dtype == torch.float32
        assert model.generate(**given, **new).equal(made.reference.generate(**given, **new))


@pytest.mark.parametrize("how", ["closed", "left", "forgotten"])
def test_files_and_threads_go_with_the_model(
    how: str, saved: Any, inputs: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    policy = Policy(gpu_batch_size=2, weights={"disk": 100}, cache={"disk": 100}, activations={"disk": 100})
    gc.collect()
    before = threading.active_count()
    # From a float32 checkpoint, so that weights are written too.
    model = saved("llama").open(policy, dtype="bfloat16")
    model.generate(**inputs([3, 4]), max_new_tokens=3)
    assert threading.active_count() > before and any(path.is_file() for path in tmp_path.rglob("*"))
    if how == "closed":
        model.close()
        model.close()
    elif how == "left":
        with model:
            pass
    else:
        del model
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


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


def test_a_limit_of_the_disk_holds_for_weights_that_are_written(
    saved: Any, inputs: Any, tmp_path: Any
) -> None:
    policy = Policy(gpu_batch_size=4, weights={"disk": 100}, cache={"disk": 100})
    made, given = saved("llama"), inputs([9, 9, 9, 9])

    def opened(most: Any, folder: str, changed: Policy = policy) -> Any:
        return made.open(
            changed, dtype="bfloat16", max_memory={"disk": most}, offload_folder=tmp_path / folder
        )

    with pytest.raises(CapacityError, match=r"weights need .* which has 1 KiB free or allowed"):
        opened("1KiB", "a")
    assert not [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    with opened("1GiB", "b") as model:
        files = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files)  # their records among them
        weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
        model.generate(**given, max_new_tokens=4)
        cache = model.lm.stats.plan.on(Tier.DISK, "cache")
    assert cache > 0
    with pytest.raises(CapacityError, match="weights need"):
        opened(weights - 1, "c")
    with opened(written, "c", policy.replace(cache={"cpu": 100})) as model:
        model.generate(**given, max_new_tokens=4)
    with opened(written + cache, "d") as model:
        model.generate(**given, max_new_tokens=4)
    with opened(written + cache - 1, "e") as model, pytest.raises(CapacityError, match="on the disk tier"):
        model.generate(**given, max_new_tokens=4)
    with opened(cache, "e") as model:  # the files are there already
        model.generate(**given, max_new_tokens=4)


def test_offload_folder_contains_the_disk_tier(saved: Any, inputs: Any, tmp_path: Any) -> None:
    policy = Policy(gpu_batch_size=2, weights={"disk": 100})
    # From a float32 checkpoint: its own files do not have the weights in the right dtype.
    with saved("llama").open(policy, dtype="bfloat16", offload_folder=tmp_path) as model:
        model.generate(**inputs([3]), max_new_tokens=2)
        assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_attributes_that_a_pipeline_reads(saved: Any) -> None:
    made = saved("llama", "bfloat16")
    with made.open(dtype="auto") as model:
        assert isinstance(model, FlexGenForCausalLM) and not isinstance(model, torch.nn.Module)
        assert model.device == torch.device("cpu") and model.dtype == torch.bfloat16
        assert model.config.model_type == "llama" and model.generation_config.eos_token_id == 1
        assert model.name_or_path == str(made.directory)
        assert model.can_generate() and model.main_input_name == "input_ids"
        assert model.eval() is model and model.train(False) is model
        assert (
            model.to("cpu") is model
            and model.to("cpu:0") is model
            and model.to(device="cpu", dtype=torch.bfloat16) is model
            and model.to("cpu", non_blocking=True) is model
            and model.to("cpu", torch.bfloat16, False) is model
        )
        for elsewhere in ("cuda:0", torch.float32):
            with pytest.raises(NotImplementedError, match="policy"):
                model.to(elsewhere)
        with pytest.raises(NotImplementedError, match="train"):
            model.train()
    for call in (model, model.generate):
        with pytest.raises(RequestError, match="closed"):
            call(torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    "written",
    [
        None,
        dict(max_new_tokens=7, repetition_penalty=1.7, eos_token_id=[6, 9, 20], pad_token_id=3),
        dict(max_length=12, do_sample=True, top_k=1, no_repeat_ngram_size=1),
    ],
    ids=["no file", "max_new_tokens", "max_length"],
)
def test_the_models_own_generation_config(written: Any, saved: Any, inputs: Any, tmp_path: Any) -> None:
    for path in saved("llama").directory.iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    given, options = inputs([4, 6]), dict(max_new_tokens=20, do_sample=False) if written is None else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generate(**given, **options)
    with FlexGenForCausalLM.from_pretrained(tmp_path, Policy(gpu_batch_size=2), "cpu") as model:
        assert model.generate(**given, **options).tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("switch", "disable"), [("enable_progress_bar", None), ("disable_progress_bar", True)]
)
def test_bars_are_off_where_those_of_transformers_are(
    switch: str, disable: bool | None, saved: Any, monkeypatch: Any
) -> None:
    """None is tqdm's own choice: on a terminal."""
    asked = []

    def bar(layers: Any, **options: Any) -> Any:
        asked.append(options["disable"])
        return layers

    directory = saved("opt").directory
    monkeypatch.setattr("flexgen.engine.opening.tqdm", bar)
    getattr(logging, switch)()
    try:
        with FlexGenForCausalLM.from_pretrained(directory, Policy(), device="cpu", dtype="float32"):
            assert asked == [disable]
    finally:
        logging.enable_progress_bar()
