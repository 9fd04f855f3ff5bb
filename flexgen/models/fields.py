"""Validation of transformers configs: every field that no layer supports raises an error."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flexgen.errors import ModelError, shown
from flexgen.formats import Encoding, read_encodings
from flexgen.kernels.scoring import Window
from flexgen.models.class_defaults import class_defaults
from flexgen.models.ops import ACTIVATIONS
from flexgen.models.rope import KINDS, ReadParameters, rope_spec
from flexgen.models.spec import RopeSpec

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

_LARGEST_SIZE = 2**31 - 1
_MOST = {"num_hidden_layers": 10_000, "head_dim": 65_536}
"""Limits of the fields that size objects and tables before any weight file is read."""
_DTYPES = {
    **dict.fromkeys(("float32", "float", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "half", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}

_QUANTIZED = ("quantization_config", "compression_config")
"""Fields in which a config describes the quantization of its weights."""

_UNRELATED = {
    "model_type", "is_decoder", "architectures", "transformers_version", "auto_map", "name_or_path",
    "tokenizer_class", "torch_dtype", "ignore_keys_at_rope_validation",
    # The outputs of transformers' forward.
    "return_dict", "output_hidden_states", "output_attentions", "use_return_dict", "use_cache", "torchscript",
    "chunk_size_feed_forward", "output_past", "cache_implementation",
    # Training: initialisation, memory and parallelism. `unrelated` adds dropout.
    "initializer_range", "init_std", "gradient_checkpointing", "pretraining_tp", "ep_size",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    # Layers after the last one, which predict further tokens.
    "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_transformer_layers", "use_mtp",
    # Heads for other tasks.
    "num_labels", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    # Special ids of encoder-decoder models and classifiers, and a text that pipelines add to prompts.
    "decoder_start_token_id", "sep_token_id", "cls_token_id", "prefix",
    # Other names for max_position_embeddings.
    "n_ctx", "seq_length", "model_max_length", "max_sequence_length",
}  # fmt: skip
"""Fields that do not change the results of a decoder."""


def unrelated(field: str) -> bool:
    """Whether a field, in the config of any family, does not change the results of a decoder."""
    training = "dropout" in field or field.endswith(("_pdrop", "layerdrop")) or field.startswith("unsloth_")
    return training or field in _UNRELATED or field.startswith(("_", "transformers."))


class Fields:
    """The fields of a transformers config, with a check of each. `name` is the name of the model for messages.

    The object records which fields were read, and `check_all_read` raises an error if any other field differs from
    its default. All methods raise ModelError with the field, its value and the supported values.
    """

    def __init__(self, config: PreTrainedConfig, name: str) -> None:
        self._config = config
        self._read = set(_QUANTIZED)
        self.name = name

    def get(self, field: str) -> Any:
        """The value of `field`; None if it is absent."""
        self._read.add(self._config.attribute_map.get(field, field))
        self._check_uniform(field)
        return getattr(self._config, field, None)

    def of_layers(self) -> list[Fields]:
        """The fields of each layer, for families in which some fields may differ between layers."""
        if not self._config.is_heterogeneous:
            return [self] * self.size("num_hidden_layers")
        layers = []
        for config in self._config.per_layer_config:
            layer = copy.copy(self)  # with the same record of what was read
            layer._config = config
            layers.append(layer)
        return layers

    def _check_uniform(self, field: str) -> None:
        """Raise ModelError if the layers have different values of `field`."""
        if self._config.is_heterogeneous and field in self._config.per_layer_attributes:
            raise ModelError(
                f"{self.name}: layers with different values of {field} (per_layer_config) are not supported"
            )

    def skip(self, *fields: str) -> None:
        """Mark fields as read that do not change the results, or that the config's class has converted to other
        fields."""
        self._read.update(self._config.attribute_map.get(field, field) for field in fields)

    def check_all_read(self) -> None:
        """Raise ModelError for the first field that was not read and differs from the default of the config's class.

        The default of a field that the class does not have is None or False.
        """
        if self._config.is_heterogeneous:
            for field in sorted(self._config.per_layer_attributes - self._read):
                if not unrelated(field):
                    self._check_uniform(field)
        default = class_defaults(type(self._config))
        for field, value in vars(self._config).items():
            if field in self._read or unrelated(field):
                continue
            off = (default[field],) if field in default else (None, False)
            if not any(value is each or (type(value) is type(each) and value == each) for each in off):
                usual = f"; supported: {shown(default[field])}" if field in default else ""
                raise ModelError(
                    f"{self.name}: {field} = {shown(value)} is not supported: no layer of this family uses it"
                    f"{usual}. If it does not change the model's results, remove it from the config"
                )

    def encodings(self) -> tuple[Encoding, ...]:
        """The encodings in which the checkpoint stores quantized matrices; empty if it is not quantized."""
        found: list[Encoding] = []
        for field in _QUANTIZED:
            value = getattr(self._config, field, None)
            as_dict = getattr(value, "to_dict", None)  # of transformers' own object
            found += read_encodings(as_dict() if as_dict else value, self.name, field)
        return tuple(dict.fromkeys(found))

    # One field

    def one_of(self, field: str, supported: Collection[Any]) -> Any:
        """The value of `field` (None if it is absent), which must be one of `supported`."""
        value = self.get(field)
        if value not in supported:
            choices = ", ".join("absent" if choice is None else repr(choice) for choice in supported)
            raise ModelError(f"{self.name}: {field} = {shown(value)} is not supported; supported: {choices}")
        return value

    def activation(self, field: str = "hidden_act") -> str:
        """The name of the activation in `field`."""
        return str(self.one_of(field, sorted(ACTIVATIONS)))

    def size(self, field: str) -> int:
        """The value of `field`, an integer from 1 to the limit of the field."""
        return check_size(self.get(field), self.name, field)

    def size_or(self, field: str, default: int) -> int:
        """`size` of a field that may be absent."""
        return default if self.get(field) is None else self.size(field)

    def count(self, field: str) -> int:
        """The value of `field`, an integer from 0 to the limit of the field."""
        value = self.get(field)
        return 0 if value == 0 and not isinstance(value, bool) else self.size(field)

    def number(self, field: str) -> float:
        """The value of `field`, a finite number >= 0."""
        value = self.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ModelError(f"{self.name}: {field} = {shown(value)} is not a finite number >= 0")
        return float(value)

    def positive(self, field: str) -> float:
        """The value of `field`, a finite number > 0."""
        value = self.number(field)
        if not value:
            raise ModelError(f"{self.name}: {field} = 0 is not supported; it must exceed 0")
        return value

    def cap(self, field: str) -> float | None:
        """The value of `field`, a finite number > 0 that limits scores or logits; None if it is absent."""
        return None if self.get(field) is None else self.positive(field)

    def flag(self, field: str) -> bool:
        """The value of `field`, true or false."""
        return bool(self.one_of(field, (True, False)))

    def flags(self, field: str) -> tuple[bool, ...]:
        """The value of `field`, a list with 0 or 1 for each layer."""
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
        """The dtype of the weights; float32 if the config has none."""
        dtype = read_dtype(self.get("dtype"), self.name)
        return torch.float32 if dtype is None else dtype

    def token_id(self, field: str) -> int | None:
        """The id in `field`; None if it is absent or not in the vocabulary."""
        ids = self.token_ids(field)
        return ids[0] if ids else None

    def token_ids(self, field: str) -> tuple[int, ...]:
        """The ids in `field`, without ids outside of the vocabulary."""
        return token_ids(self.get(field), self.name, field, self.size("vocab_size"))

    # Several fields

    def layer_kinds(
        self, supported: Sequence[str] = ("full_attention", "sliding_attention")
    ) -> tuple[str, ...]:
        """The kind of attention of each layer, from layer_types; "full_attention" for all layers if it is absent."""
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

    def mixtures_by_step(self) -> tuple[bool, ...]:
        """For each layer, whether it is a mixture: each decoder_sparse_step-th one, except for mlp_only_layers."""
        dense, step = self.numbered_layers("mlp_only_layers"), self.size("decoder_sparse_step")
        return tuple(not only and (index + 1) % step == 0 for index, only in enumerate(dense))

    def numbered_layers(self, field: str) -> tuple[bool, ...]:
        """For each layer, whether its number is in the list in `field`."""
        numbers = self.get(field)
        if not isinstance(numbers, list | tuple) or not all(type(index) is int for index in numbers):
            raise ModelError(
                f"{self.name}: {field} = {shown(numbers)} is not supported; expected a list of layer numbers"
            )
        return tuple(index in numbers for index in range(self.size("num_hidden_layers")))

    def mlp_kinds(self) -> tuple[str, ...]:
        """The kind of the second half of each layer, "dense" or "sparse", from mlp_layer_types."""
        count, kinds = self.size("num_hidden_layers"), self.get("mlp_layer_types")
        known = isinstance(kinds, list | tuple) and all(kind in ("dense", "sparse") for kind in kinds)
        if not known or len(kinds) != count:
            raise ModelError(
                f"{self.name}: mlp_layer_types = {shown(kinds)} is not supported; supported: dense, sparse, one for "
                f"each of {count} layers"
            )
        return tuple(kinds)

    def chunks(self) -> tuple[Window | None, ...]:
        """The window of each layer's attention, None for all tokens. Layers of the kind "chunked_attention" have
        chunks of attention_chunk_size."""
        kinds = self.layer_kinds(("full_attention", "chunked_attention"))
        if "chunked_attention" not in kinds:
            self.skip("attention_chunk_size")
            return (None,) * len(kinds)
        window = Window(self.size("attention_chunk_size"), chunked=True)
        return tuple(window if kind == "chunked_attention" else None for kind in kinds)

    def windows(self) -> tuple[Window | None, ...]:
        """The window of each layer's attention, None for all tokens.

        Layers of the kind "sliding_attention" have the window sliding_window; without layer_types all layers have it.
        """
        kinds, size = self.layer_kinds(), self.get("sliding_window")
        if self.get("layer_types") is None:
            kinds = ("sliding_attention",) * len(kinds)
        if size is None or "sliding_attention" not in kinds:
            return (None,) * len(kinds)
        window = Window(self.size("sliding_window"))
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def rope(
        self,
        head_dim: int,
        partial: bool = False,
        interleaved: bool = False,
        kind: str | None = None,
        others: Sequence[str] = (),
    ) -> RopeSpec:
        """The RoPE for heads of `head_dim` values.

        partial: whether the family supports partial_rotary_factor. interleaved: see `RopeSpec`. kind: the kind of
        attention, if rope_parameters can have one object for each kind. others: names in rope_parameters that the
        family reads itself.
        """
        self._read |= {"rope_theta", "rope_scaling", "original_max_position_embeddings"}
        self.get("partial_rotary_factor") if partial else self.one_of("partial_rotary_factor", (None, 1.0))
        config = copy.deepcopy(self._config)  # the parameters are completed in place below
        self._rope_type(self.get("rope_parameters"), kind)
        try:
            config.standardize_rope_params()  # adds lengths and theta from outside of the parameters
            parameters = ReadParameters(_of_kind(config.rope_parameters, kind), others)
            share = parameters.get("partial_rotary_factor")
            proportional = parameters.get("rope_type") == "proportional"  # rotates the others by zero
            rotated = head_dim if share is None or proportional else int(head_dim * share)
            spec = rope_spec(parameters, rotated, config.max_position_embeddings)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            parameters = config.rope_parameters
            raise ModelError(
                f"{self.name}: rope_parameters = {shown(parameters)} is invalid: {shown(error)}"
            ) from error
        if not partial and share not in (None, 1):
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
                f"{self.name}: {field} = {shown(parameters[field])} in rope_parameters is not supported for "
                f"rope_type {spec.kind!r}"
            )
        return replace(spec, interleaved=interleaved)

    def _rope_type(self, given: Any, kind: str | None) -> None:
        """Raise ModelError unless rope_parameters have a supported type."""
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
    """The parameters for layers of a kind, if `parameters` has one object for each kind."""
    if kind is not None and isinstance(parameters, dict) and isinstance(parameters.get(kind), dict):
        return parameters[kind]
    return parameters


def check_values(values: Mapping[str, Any], name: str) -> None:
    """Check values on which transformers would fail without a useful message. Raises ModelError."""
    for field in _QUANTIZED:
        read_encodings(values.get(field), name, field)
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ModelError(f"{name}: layer_types = {shown(kinds)} is not supported; expected a list of names")
    for field in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
        if field in values:
            check_size(values[field], name, field)


def check_size(value: Any, name: str, field: str) -> int:
    """`value`, the value of `field`. Raises ModelError unless it is an integer from 1 to the limit of the field."""
    most = _MOST.get(field, _LARGEST_SIZE)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(
            f"{name}: {field} = {shown(value)} is not a size; it must be an integer from 1 to {most}"
        )
    return value


def read_dtype(value: Any, name: str) -> torch.dtype | None:
    """The dtype named by `value`; None for None and "auto". Raises ModelError."""
    if value is None or value == "auto":
        return None
    text = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    if text not in _DTYPES:
        raise ModelError(
            f"{name}: dtype = {shown(value)} is not supported; supported: float32, float16, bfloat16, auto"
        )
    return _DTYPES[text]


def token_ids(value: Any, name: str, field: str, vocab_size: int) -> tuple[int, ...]:
    """The ids in `value`: None, one id or a list. Ids outside of the vocabulary are left out.

    Raises ModelError for an id that is not an integer.
    """
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool):
            raise ModelError(f"{name}: {field} = {shown(value)} is not a token id; it must be an integer")
    return tuple(each for each in ids if 0 <= each < vocab_size)
