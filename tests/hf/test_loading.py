"""The arguments of transformers' `from_pretrained`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.errors import ModelError, RequestError, UnsupportedError
from flexgen.hf import FlexGenForCausalLM
from flexgen.hf.loading import read_device_map, read_dtype


def test_a_usual_call_of_transformers_opens(saved: Any, inputs: Any) -> None:
    made, given = saved("llama"), inputs([3, 7])
    with FlexGenForCausalLM.from_pretrained(
        made.directory, torch_dtype=torch.float32, device_map={"": "cpu"}, revision="main", token=False,
        cache_dir="/nowhere", local_files_only=True, trust_remote_code=False, low_cpu_mem_usage=True,
        use_safetensors=True, quantization_config=None, load_in_8bit=False,
    ) as model:  # fmt: skip
        assert model.dtype == torch.float32 and model.device == torch.device("cpu")
        assert model.generate(**given, max_new_tokens=3, do_sample=False).equal(
            made.reference.generate(**given, max_new_tokens=3, do_sample=False)
        )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"trust_remote_code": True}, "never runs code from a repository"),
        ({"quantization_config": object()}, "codec"),
        ({"load_in_8bit": True}, "codec"),
        ({"attn_implementation": "flash_attention_2"}, "its own attention kernels"),
        ({"gguf_file": "model.gguf"}, r"from_pretrained\('folder/model\.gguf'\)"),
        ({"state_dict": {}}, "save_pretrained"),
        ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, "device_map of 2 modules.* Policy"),
        ({"device_map": {"": "disk"}}, r"weights=\{'disk': 100\}"),
        ({"device_map": "balanced"}, "one device"),
    ],
)
def test_unsupported_arguments_name_the_alternative(argument: Any, words: str, saved: Any) -> None:
    with pytest.raises(UnsupportedError, match=words):
        FlexGenForCausalLM.from_pretrained(saved("llama").directory, **argument)


def test_unknown_arguments_are_type_errors(saved: Any) -> None:
    with pytest.raises(TypeError, match=r"'revison' \(did you mean 'revision'\?\)"):
        FlexGenForCausalLM.from_pretrained(saved("llama").directory, revison="main")


def test_device_maps() -> None:
    for nothing in (None, "auto", "sequential"):
        assert read_device_map(nothing, "cuda:1") == "cuda:1"
    for given, device in (
        ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), (0, "cuda:0"), (torch.device("cpu"), "cpu"),
        ({"": 2}, "cuda:2"), ({"": "cpu"}, "cpu"), ({"": torch.device("cuda", 1)}, "cuda:1"),
    ):  # fmt: skip
        assert read_device_map(given, "auto") == device
    assert read_device_map(0, "cuda") == "cuda:0"
    for wrong in ("gpu", -1, True, 1.5, {"": None}, ["cpu"]):
        with pytest.raises(RequestError, match="is not known"):
            read_device_map(wrong, "auto")
    with pytest.raises(RequestError, match="differ"):
        read_device_map("cpu", "cuda:0")


def test_the_two_names_of_the_dtype() -> None:
    assert read_dtype(None, None) == read_dtype("auto", None) == "auto"
    assert read_dtype("auto", torch.float16) == torch.float16
    assert read_dtype("float16", torch.float16) == "float16"
    with pytest.raises(RequestError, match="differ"):
        read_dtype("float32", torch.float16)


def test_hub_options_reach_the_download(saved: Any, tmp_path: Any, monkeypatch: Any) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(saved("llama").directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = dict(revision="v2", token="secret", cache_dir=tmp_path, local_files_only=True)
    with FlexGenForCausalLM.from_pretrained("some/llama", device="cpu", **options):
        pass
    assert asked["repository"] == "some/llama" and asked.items() >= options.items()


def test_local_files_only_asks_the_given_cache(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="some/llama"):
        FlexGenForCausalLM.from_pretrained("some/llama", cache_dir=tmp_path, local_files_only=True)
