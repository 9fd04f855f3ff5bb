"""Reading a transformers config: each field with a check, and no field passed over."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flexgen.errors import ModelError, shown
from flexgen.models.ops import ACTIVATIONS
from flexgen.models.rope import KINDS, rope_spec
from flexgen.models.spec import RopeSpec

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

_LARGEST_SIZE = 2**31 - 1
_MOST = {"num_hidden_layers": 10_000, "head_dim": 65_536}
"""Of fields by which objects and tables are made before a file is read: the largest value."""
_DTYPES = {
    **dict.fromkeys(("float32", "float", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "half", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}

_QUANTIZED = ("quantization_config", "compression_config")
"""Fields by which GPTQ, AWQ, bitsandbytes, fp8 and others say how they changed the weights."""

_UNRELATED = {
    "model_type", "is_decoder", "architectures", "transformers_version", "auto_map", "name_or_path",
    "tokenizer_class", "torch_dtype",
    # What a call of transformers returns, and how.
    "return_dict", "output_hidden_states", "output_attentions", "use_return_dict", "use_cache", "torchscript",
    "chunk_size_feed_forward", "output_past",
    # Training: initial values, memory, and how matrices were divided. `unrelated` knows those of dropout.
    "initializer_range", "init_std", "gradient_checkpointing", "pretraining_tp", "ep_size",
    # Heads for other tasks than text.
    "num_labels", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    # Ids that encoders, decoders of encoders and pipelines use, and a text that those put before a prompt.
    "decoder_start_token_id", "sep_token_id", "cls_token_id", "prefix",
    # Other names for the length that max_position_embeddings gives.
    "n_ctx", "seq_length", "model_max_length", "max_sequence_length",
}  # fmt: skip
"""Fields that change no number that a decoder computes."""


def unrelated(field: str) -> bool:
    """Whether a field of any config changes no number that a decoder computes."""
    training = "dropout" in field or field.endswith(("_pdrop", "layerdrop")) or field.startswith("unsloth_")
    return training or field in _UNRELATED or field.startswith(("_", "transformers."))


class Fields:
    """A transformers config as a family reads it. `name` is the model's, for messages.

    It remembers which fields were read: `check_all_read` refuses a config that asks for anything else. All methods
    raise ModelError, with the field, its value and what is supported.
    """

    def __init__(self, config: PreTrainedConfig, name: str) -> None:
        for field in _QUANTIZED:
            check_unquantized(getattr(config, field, None), name, field)
        self._config = config
        self._read = set(_QUANTIZED)
        self.name = name

    def get(self, field: str) -> Any:
        """The value of `field`, None where it is absent."""
        self._read.add(self._config.attribute_map.get(field, field))
        return getattr(self._config, field, None)

    def skip(self, *fields: str) -> None:
        """Fields that change no result, or whose values the config's class has put into others."""
        self._read.update(self._config.attribute_map.get(field, field) for field in fields)

    def check_all_read(self) -> None:
        """Raise for the first field that was not read and that is not as its class has it by default.

        A field that the class does not know is off where it is None or False.
        """
        default = vars(type(self._config)())
        for field, value in vars(self._config).items():
            if field in self._read or unrelated(field):
                continue
            off = (default[field],) if field in default else (None, False)
            if not any(value is each or (type(value) is type(each) and value == each) for each in off):
                usual = f"; supported: {shown(default[field])}" if field in default else ""
                raise ModelError(
                    f"{self.name}: {field} = {shown(value)} is not supported: no layer of this family computes it"
                    f"{usual}. If it does not change the model's results, remove it from the config"
                )

    # One field

    def one_of(self, field: str, supported: Collection[Any]) -> Any:
        """The value of `field` (None where it is absent), which must be one of `supported`."""
        value = self.get(field)
        if value not in supported:
            choices = ", ".join("absent" if choice is None else repr(choice) for choice in supported)
            raise ModelError(f"{self.name}: {field} = {shown(value)} is not supported; supported: {choices}")
        return value

    def activation(self, field: str = "hidden_act") -> str:
        """The name of the activation in `field`."""
        return str(self.one_of(field, sorted(ACTIVATIONS)))

    def size(self, field: str) -> int:
        """The value of `field`, an integer of 1 up to the largest that a model has."""
        return check_size(self.get(field), self.name, field)

    def size_or(self, field: str, default: int) -> int:
        """`size` of a field that may be absent."""
        return default if self.get(field) is None else self.size(field)

    def number(self, field: str) -> float:
        """The value of `field`, a finite number >= 0."""
        value = self.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ModelError(f"{self.name}: {field} = {shown(value)} is not a finite number >= 0")
        return float(value)

    def positive(self, field: str) -> float:
        """`number` of a field that must exceed 0."""
        value = self.number(field)
        if not value:
            raise ModelError(f"{self.name}: {field} = 0 is not supported; it must exceed 0")
        return value

    def flag(self, field: str) -> bool:
        """The value of `field`, true or false."""
        return bool(self.one_of(field, (True, False)))

    def flags(self, field: str) -> tuple[bool, ...]:
        """The value of `field`, a list with true or false, 1 or 0, for each layer."""
        values, count = self.get(field), self.size("num_hidden_layers")
        if (
            not isinstance(values, list | tuple)
            or len(values) != count
            or any(v not in (0, 1) for v in values)
        ):
            raise ModelError(
                f"{self.name}: {field} = {shown(values)} is not supported; expected 0 or 1 for each of {count} layers"
            )
        return tuple(map(bool, values))

    def multiple(self, field: str, value: int, of_field: str, of: int) -> None:
        """Raise unless `value` is a multiple of `of`."""
        if value % of:
            raise ModelError(f"{self.name}: {field} = {value} is not a multiple of {of_field} = {of}")

    def dtype(self) -> torch.dtype:
        """The dtype of the weights; float32 where the config says nothing."""
        dtype = read_dtype(self.get("dtype"), self.name)
        return torch.float32 if dtype is None else dtype

    def token_id(self, field: str) -> int | None:
        """The id in `field`; None where there is none, or one that the vocabulary does not have."""
        ids = self.token_ids(field)
        return ids[0] if ids else None

    def token_ids(self, field: str) -> tuple[int, ...]:
        """The ids in `field`, without those that the vocabulary does not have."""
        return token_ids(self.get(field), self.name, field, self.size("vocab_size"))

    # What several fields say

    def layer_kinds(
        self, supported: Sequence[str] = ("full_attention", "sliding_attention")
    ) -> tuple[str, ...]:
        """The kind of attention of each layer, from layer_types; "full_attention" for all where it is absent."""
        count, kinds = self.size("num_hidden_layers"), self.get("layer_types")
        if kinds is None:
            return ("full_attention",) * count
        known = isinstance(kinds, list | tuple) and all(kind in supported for kind in kinds)
        if not known or len(kinds) != count:
            raise ModelError(
                f"{self.name}: layer_types = {shown(kinds)} is not supported; supported: {', '.join(supported)}, "
                f"one for each of {count} layers"
            )
        return tuple(kinds)

    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer's attention, None for all tokens.

        Layers of the kind "sliding_attention" have the window sliding_window; without layer_types all layers have it.
        No window may be shorter than max_position_embeddings: it is not computed.
        """
        kinds, size = self.layer_kinds(), self.get("sliding_window")
        if self.get("layer_types") is None:
            kinds = ("sliding_attention",) * len(kinds)
        if size is None or "sliding_attention" not in kinds:
            return (None,) * len(kinds)
        window, context = self.size("sliding_window"), self.size("max_position_embeddings")
        if window < context:
            raise ModelError(
                f"{self.name}: sliding_window = {window} is shorter than max_position_embeddings = {context}, and "
                "such a window is not computed yet. For texts of at most that many tokens, set "
                f"max_position_embeddings to {window} in the config"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def rope(
        self,
        head_dim: int,
        partial: bool = False,
        interleaved: bool = False,
        kind: str | None = None,
        besides: Sequence[str] = (),
    ) -> RopeSpec:
        """The RoPE of heads of `head_dim` values.

        partial: whether the family may rotate a part of each head, as partial_rotary_factor says. interleaved: as in
        `RopeSpec`. kind: the layers' kind of attention, where rope_parameters may have one object for each kind.
        besides: parameters that are not of the rotation, which the family reads.
        """
        self._read |= {"rope_theta", "rope_scaling", "original_max_position_embeddings"}
        self.get("partial_rotary_factor") if partial else self.one_of("partial_rotary_factor", (None, 1.0))
        config = copy.deepcopy(self._config)  # its parameters are completed in place below
        self._rope_type(self.get("rope_parameters"), kind)
        try:
            config.standardize_rope_params()  # lengths and theta that are stated outside of the parameters
            parameters = _Parameters(_of_kind(config.rope_parameters, kind), besides)
            share = parameters.get("partial_rotary_factor")
            rotated = head_dim if share is None else int(head_dim * share)
            spec = rope_spec(parameters, rotated, config.max_position_embeddings)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            parameters = config.rope_parameters
            raise ModelError(
                f"{self.name}: rope_parameters = {shown(parameters)} cannot be used: {shown(error)}"
            ) from error
        if not partial and rotated != head_dim:
            raise ModelError(
                f"{self.name}: partial_rotary_factor = {shown(share)} is not supported; supported: 1.0"
            )
        if rotated % 2 or not 0 < rotated <= head_dim:
            raise ModelError(
                f"{self.name}: partial_rotary_factor = {shown(share)} rotates {rotated} of {head_dim} values of a "
                "head; it must be an even number of them"
            )
        for field in parameters.unread():
            raise ModelError(
                f"{self.name}: {field} = {shown(parameters[field])} in rope_parameters is not supported: RoPE of the "
                f"type {spec.kind!r} does not compute it"
            )
        return replace(spec, interleaved=interleaved)

    def _rope_type(self, given: Any, kind: str | None) -> None:
        """Raise for rope_parameters of a type that is not computed."""
        given = _of_kind(given or {}, kind)
        if not isinstance(given, dict):
            raise ModelError(
                f"{self.name}: rope_parameters = {shown(given)} is not supported; expected an object"
            )
        rope_type = given.get("rope_type", "default")
        if not isinstance(rope_type, str) or rope_type not in KINDS:
            raise ModelError(
                f"{self.name}: rope_type = {shown(rope_type)} is not supported; supported: {', '.join(KINDS)}"
            )


def _of_kind(parameters: Any, kind: str | None) -> Any:
    """Those of the layers of a kind, where `parameters` has one object for each kind."""
    if kind is not None and isinstance(parameters, dict) and isinstance(parameters.get(kind), dict):
        return parameters[kind]
    return parameters


class _Parameters(Mapping[str, Any]):
    """The parameters of a RoPE, which remember those that were read."""

    def __init__(self, values: dict[str, Any], read: Sequence[str]) -> None:
        self._values = values
        # Another name for rope_type, and a note on how a model was trained.
        self._read = {"rope_type", "type", "finetuned", *read}

    def __getitem__(self, field: str) -> Any:
        self._read.add(field)
        return self._values[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """Names of those that were not read and that have a value."""
        return [
            field for field, value in self._values.items() if field not in self._read and value is not None
        ]


def check_values(values: Mapping[str, Any], name: str) -> None:
    """Check what transformers would divide by, or fail over without naming it. Raises ModelError."""
    for field in _QUANTIZED:
        check_unquantized(values.get(field), name, field)
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ModelError(f"{name}: layer_types = {shown(kinds)} is not supported; expected a list of names")
    for field in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
        if field in values:
            check_size(values[field], name, field)


def check_unquantized(value: Any, name: str, field: str) -> None:
    """Raises ModelError for `value`, that of a field of `_QUANTIZED`, unless it is absent."""
    if value is None:
        return
    method = value.get("quant_method") if isinstance(value, dict) else value
    raise ModelError(
        f"{name}: {field} says that the weights are quantized ({shown(method)}), which is not supported. Give the "
        "checkpoint in float16, bfloat16 or float32; a policy with int4 or int8 weights quantizes it on opening"
    )


def check_size(value: Any, name: str, field: str) -> int:
    """`value`, which is that of `field`. Raises ModelError unless it is an integer from 1 to the most a model has."""
    most = _MOST.get(field, _LARGEST_SIZE)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(
            f"{name}: {field} = {shown(value)} is not a size; it must be an integer from 1 to {most}"
        )
    return value


def read_dtype(value: Any, name: str) -> torch.dtype | None:
    """The dtype that `value` names, None for "auto" and where nothing is said. Raises ModelError."""
    if value is None or value == "auto":
        return None
    text = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    if text not in _DTYPES:
        raise ModelError(
            f"{name}: dtype = {shown(value)} is not supported; supported: float32, float16, bfloat16, auto"
        )
    return _DTYPES[text]


def token_ids(value: Any, name: str, field: str, vocab_size: int) -> tuple[int, ...]:
    """The ids in `value`, which is none, one or several. Ids that the vocabulary does not have are left out.

    Raises ModelError for what is not an id.
    """
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool):
            raise ModelError(
                f"{name}: {field} = {shown(value)} is not a token id; give its number in the vocabulary"
            )
    return tuple(each for each in ids if 0 <= each < vocab_size)
