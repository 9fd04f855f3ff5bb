"""The methods and attributes of transformers' `PreTrainedModel`, for a model whose weights a policy places."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from flexgen.engine.model import OptLM
from flexgen.errors import UnsupportedError
from flexgen.models import WeightSpec, build_layers


class Pretrained:
    """The interface for programs that expect a `PreTrainedModel`.

    All other methods of `PreTrainedModel` and `torch.nn.Module` raise UnsupportedError with the reason.
    """

    lm: OptLM
    config: PreTrainedConfig
    generation_config: GenerationConfig

    main_input_name = "input_ids"
    input_modalities = ("text",)
    output_modalities = ("text",)
    base_model_prefix = "model"
    framework = "pt"
    config_class = None
    generation_config_class = GenerationConfig
    supports_gradient_checkpointing = False
    is_gradient_checkpointing = False
    model_tags = None
    training = False
    _auto_class = None
    _can_compile_fullgraph = False
    _hf_peft_config_loaded = False
    _is_stateful = False
    _keep_in_fp32_modules = None
    _no_split_modules = None
    _skip_keys_device_placement = None
    _supports_attention_backend = False
    _supports_cache_class = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_sdpa = False
    _tied_weights_keys = None
    _tp_plan = None
    _tp_size = None

    @property
    def device(self) -> torch.device:
        """The compute device. Inputs may be on any device; results are on the device of the inputs."""
        return torch.device(self.lm.device if self.lm.device.startswith("cuda") else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Always empty: transformers' kernels for experts are not used."""
        return {}

    def eval(self) -> Self:
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise UnsupportedError("training is not supported: flexgen only runs models")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return the model for False. Raises UnsupportedError for True."""
        return self.train(requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the model if it has this device and dtype. Raises UnsupportedError otherwise: no weight is moved."""
        for asked in (*args, *kwargs.values()):
            if isinstance(asked, torch.dtype):
                there = asked == self.dtype
            elif isinstance(asked, str | int | torch.device) and not isinstance(asked, bool):  # non_blocking
                device = torch.device(asked)
                there = device.type == self.device.type and device.index in (None, self.device.index or 0)
            else:
                continue
            if not there:
                raise UnsupportedError(
                    f"to({asked}) is not supported: the model computes on {self.device} in {self.dtype}, and the "
                    "policy places its weights. Open it again with device=, dtype= or policy=; for a pipeline, pass "
                    f"device={str(self.device)!r}"
                )
        return self

    def cpu(self) -> Self:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        return self.to("cuda" if device is None else device)

    def half(self) -> Self:
        return self.to(torch.float16)

    def float(self) -> Self:
        return self.to(torch.float32)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        return self.to(torch.float64)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a tied head is tied when the model is opened."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The names in the checkpoint, each with a tensor of its shape and dtype on the compute device, full of NaN.

        The real values are on the tiers of the policy. Programs move inputs to the device of the first parameter, so
        this is the compute device. All elements of a tensor share the memory of one element.
        """
        unknown = torch.full((), torch.nan, dtype=self.dtype, device=self.device)
        for weight in self._weights():
            yield weight.key, unknown.expand(weight.shape)

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """The tensors of `named_parameters`."""
        return (tensor for _, tensor in self.named_parameters())

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Always empty: there are no buffers."""
        return iter(())

    def buffers(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """Always empty: there are no buffers."""
        return iter(())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights, with a tied head counted once. None are trainable."""
        if only_trainable:
            return 0
        return sum(
            weight.numel for weight in self._weights() if not (exclude_embeddings and weight.looked_up)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights in `dtype`, on all tiers together and without codecs."""
        return sum(weight.nbytes(self.dtype) for weight in self._weights())

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **others: Any) -> None:
        """Write the config and the generation config, and warn that the weights are not written.

        Raises UnsupportedError for `push_to_hub`.
        """
        if push_to_hub:
            raise UnsupportedError("push_to_hub is not supported: upload the model's files with `hf upload`")
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)
        warnings.warn(
            f"{save_directory}: wrote the config and the generation config, but not the weights, which flexgen does "
            f"not change; copy their files from {self.lm.tokenizer_dir}",
            stacklevel=2,
        )

    def _weights(self) -> list[WeightSpec]:
        weights = {weight.key: weight for layer in build_layers(self.lm.spec) for weight in layer.weights}
        return list(weights.values())


_REASONS = {
    "flexgen's layers are not torch modules": """
        add_module apply children get_buffer get_decoder get_encoder get_extra_state get_input_embeddings
        get_output_embeddings get_parameter get_parameter_or_buffer get_position_embeddings get_submodule modules
        named_children named_modules named_non_persistent_buffers register_backward_hook register_buffer
        register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
        register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
        register_state_dict_post_hook register_state_dict_pre_hook retrieve_modules_from_names set_decoder set_encoder
        set_extra_state set_submodule smart_apply
    """,
    "the weights are on the tiers of the policy; read them from the model's files": """
        dequantize gather_sharded_state_dict_for_save get_expanded_tied_weights_keys init_weights initialize_weights
        load_state_dict mark_tied_weights_as_initialized post_init push_to_hub resize_position_embeddings
        resize_token_embeddings save_distributed_checkpoint set_input_embeddings set_output_embeddings share_memory
        state_dict to_empty
    """,
    "merge the adapter into the model first (peft's merge_and_unload) and open the result": """
        active_adapters add_adapter delete_adapter disable_adapters enable_adapters enable_peft_hotswap
        get_adapter_state_dict load_adapter set_adapter
    """,
    "flexgen only runs models, without training": """
        activation_checkpointing_disable activation_checkpointing_enable disable_input_require_grads
        enable_input_require_grads gradient_checkpointing_disable gradient_checkpointing_enable zero_grad
    """,
    "flexgen has its own kernels": """
        compile get_compiled_call get_correct_attn_implementation get_correct_experts_implementation
        set_attn_implementation set_experts_implementation set_use_kernels
    """,
    "open the model again with device= or dtype=": "ipu mtia type xpu",
    "flexgen computes on one device": """
        barrier_after_gathered_checkpoint_save init_parallel_plans maybe_distribute_model prepare_distribute_model
        should_save_on_this_rank
    """,
    "it describes classes of transformers, and this class is not one of them": """
        add_model_tags extra_repr get_init_context is_backend_compatible is_custom_code register_for_auto_class
        warn_if_padding_and_no_attention_mask
    """,
}
"""Reasons, and the methods that are not supported for each."""


def _refused(name: str, reason: str) -> Callable[..., Any]:
    def method(self: Pretrained, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"{name} is not supported: {reason}")

    method.__name__, method.__doc__ = name, f"Raises UnsupportedError: {reason}."
    return method


for _reason, _names in _REASONS.items():
    for _name in _names.split():
        setattr(Pretrained, _name, _refused(_name, _reason))
