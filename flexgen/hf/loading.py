"""The arguments of transformers' `from_pretrained`, converted to those of `OptLM`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flexgen.errors import RequestError, UnsupportedError, did_you_mean, shown

_NO_EFFECT = frozenset(
    {"low_cpu_mem_usage", "offload_buffers", "offload_state_dict", "use_safetensors", "weights_only"}
)
"""Arguments that are accepted and ignored: tensors are always read in place, and pickles never run code."""

_ATTENTION = "flexgen has its own attention kernels; use Policy(attend_on=...) to choose where they run"
_BITS = "use a Policy with codecs, such as weights={'gpu': {'percent': 100, 'codec': 'int4'}}"
_CONFIG = "the config is read from the model's directory; edit its config.json"
_FILES = "give the path of a directory with config.json and safetensors or .bin files"
_PARALLEL = "flexgen computes on one device"
_WEIGHTS = "weights are read from files; call save_pretrained on the model and give the directory"

_UNSUPPORTED = {
    "adapter_kwargs": "merge the adapter into the model first (peft's merge_and_unload) and save the result",
    "adapter_name": "merge the adapter into the model first (peft's merge_and_unload) and save the result",
    "attn_implementation": _ATTENTION,
    "code_revision": "flexgen runs no code from a repository",
    "config": _CONFIG,
    "device_mesh": _PARALLEL,
    "distributed_config": _PARALLEL,
    "experts_implementation": "flexgen has its own layers",
    "force_download": "delete the model from the cache (`hf cache rm`), then open it again",
    "from_flax": _FILES,
    "from_tf": _FILES,
    "generation_config": "pass it to generate, or assign it to model.generation_config",
    "gguf_file": "give the path of the file itself, from_pretrained('folder/model.gguf')",
    "ignore_mismatched_sizes": "every weight must have the shape in the config",
    "key_mapping": "the names of a family's weights are fixed; rename them in the files",
    "kernel_config": "flexgen has its own kernels",
    "load_in_4bit": _BITS,
    "load_in_8bit": _BITS,
    "mirror": "set the environment variable HF_ENDPOINT",
    "output_loading_info": "missing weights and wrong shapes are errors",
    "proxies": "set the environment variable HTTPS_PROXY",
    "quantization_config": _BITS,
    "state_dict": _WEIGHTS,
    "subfolder": "download the repository and give the path of the folder",
    "tp_plan": _PARALLEL,
    "tp_size": _PARALLEL,
    "use_kernels": "flexgen has its own kernels",
    "variant": _FILES,
}
"""Unsupported arguments of transformers, with the alternatives."""


def refuse_arguments(others: Mapping[str, Any], method: Callable[..., Any]) -> None:
    """Check the arguments that are not in the signature of `method`. None and False count as not given.

    Raises UnsupportedError for an unsupported argument of transformers, and TypeError for an unknown argument.
    """
    for name, value in others.items():
        if name in _NO_EFFECT:
            continue
        if name not in _UNSUPPORTED:
            known = [*inspect.signature(method).parameters, *_UNSUPPORTED]
            raise TypeError(f"from_pretrained has no argument {shown(name)}{did_you_mean(name, known)}")
        if value is not None and value is not False:
            raise UnsupportedError(f"{name}={shown(value)} is not supported: {_UNSUPPORTED[name]}")


def refuse_remote_code(trust_remote_code: bool | None) -> None:
    """Raise UnsupportedError if the caller asks for code from the repository."""
    if trust_remote_code:
        raise UnsupportedError(
            "trust_remote_code=True is not supported: flexgen has its own layers and never runs code from a "
            "repository; leave it out. All supported families open without it"
        )


def read_dtype(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None) -> str | torch.dtype:
    """The dtype from `dtype` or its older name `torch_dtype`. Raises RequestError if they differ."""
    given = [value for value in (dtype, torch_dtype) if value is not None and value != "auto"]
    if len({str(value).removeprefix("torch.") for value in given}) > 1:
        raise RequestError(
            f"dtype={dtype} and torch_dtype={torch_dtype} differ; they are names of one argument: give one of them"
        )
    return given[0] if given else "auto"


def read_device_map(device_map: Any, device: str | torch.device) -> str:
    """The compute device, from accelerate's `device_map` and flexgen's `device`.

    With "auto", "sequential" or None, `device` is used. Otherwise the map is a device or `{"": device}`. The policy
    always decides where the weights are stored.

    Raises UnsupportedError for a map of modules, several devices or the disk, and RequestError for an invalid map or
    if the map and `device` differ.
    """
    asked = str(device)
    if device_map is None or (isinstance(device_map, str) and device_map in ("auto", "sequential")):
        return asked
    value = device_map
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise UnsupportedError(
                f"a device_map of {len(device_map)} modules is not supported: flexgen places weights by the "
                "percentages of a Policy. Leave device_map out, and pass for example "
                "policy=Policy(weights={'gpu': 40, 'cpu': 30, 'disk': 30})"
            )
        value = device_map[""]
    if value in ("balanced", "balanced_low_0"):
        raise UnsupportedError(
            f"device_map={shown(value)} is not supported: {_PARALLEL}; use device_map='auto'"
        )
    if value == "disk":
        raise UnsupportedError(
            "device_map='disk' is not supported: a disk is not a compute device. "
            "Pass policy=Policy(weights={'disk': 100})"
        )
    mapped = _device(value)
    if mapped is None:
        raise RequestError(
            f"device_map={shown(device_map)} is not known; use 'auto', 'cpu', 'cuda', 'cuda:0', the number of a GPU "
            "or {'': device}, and a policy to place the weights"
        )
    if asked != "auto" and _device(asked) != mapped:
        raise RequestError(
            f"device_map={shown(device_map)} and device={shown(asked)} differ; give one of them"
        )
    return mapped


def _device(value: Any) -> str | None:
    """The name of a device, with a number for a GPU; None for any other value."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"cuda:{value}"
    if isinstance(value, torch.device):
        value = str(value)
    if isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d+)?", value, re.ASCII):
        return "cuda:0" if value == "cuda" else value
    return None
