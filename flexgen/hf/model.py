"""`FlexGenForCausalLM`: an `OptLM` with the methods that users of transformers call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.logging import is_progress_bar_enabled

from flexgen.engine import OptLM
from flexgen.errors import RequestError, UnsupportedError
from flexgen.hf.loading import read_device_map, read_dtype, refuse_arguments, refuse_remote_code
from flexgen.hf.loss import check_labels, loss_of
from flexgen.hf.max_memory import read_max_memory
from flexgen.hf.pretrained import Pretrained
from flexgen.hf.processors import RowProcessors
from flexgen.hf.steps import HFChoice, Record, record_needs, steps_asked
from flexgen.models import HubOptions
from flexgen.policy import Policy
from flexgen.runtime.choice import Listener, Rows
from flexgen.runtime.request import Request, check_length, pad_id, read_request

_LEAST_TEMPERATURE = 1e-30
_DEFAULT_NEW_TOKENS = 50

_UNSUPPORTED = {
    "inputs_embeds": "it takes input_ids",
    "output_attentions": "attention weights are never formed as a whole",
    "past_key_values": "the KV cache lives in the tiers of the policy, for one call",
    "position_ids": "positions are counted from the attention mask",
    "assistant_model": "there is no assisted generation",
    "prompt_lookup_num_tokens": "there is no assisted generation",
    "custom_generate": "it has its own schedule",
    "negative_prompt_ids": "there is no guidance",
}
"""Arguments that are refused, and why: of both methods, then of one of them."""

_UNSUPPORTED_OF_FORWARD = _UNSUPPORTED | {
    "use_cache": "there would be no past_key_values to go on from; generate keeps the cache",
}

_UNSUPPORTED_OF_GENERATE = {
    "output_attentions": "attention weights are never formed as a whole",
    "output_hidden_states": "forward gives them",
    "guidance_scale": "it would run the model a second time",
    "token_healing": "it would generate with beams",
}


class FlexGenForCausalLM(Pretrained, GenerationMixin):
    """A model that need not fit its device, with the face of a transformers model.

    `generate` is `GenerationMixin.generate`, which reads arguments and generation configs and makes processors and
    criteria; what it calls to compute is flexgen's block schedule. `lm` is the `OptLM` underneath, with its policy
    and the statistics of the last call. Use it as a context manager, or `close` it.
    """

    def __init__(self, lm: OptLM, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        self.lm = lm
        self.config = config
        self.generation_config = generation_config
        self.name_or_path = config.name_or_path

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        policy: Policy | str | Path = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = "auto",
        offload_folder: str | Path | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        *,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | Mapping[str, str | int | torch.device] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool | None = False,
        **others: Any,
    ) -> Self:
        """Open a model; see `OptLM` for `policy`, `device` and `dtype`.

        offload_folder: where weights, cache and hidden states of the disk tier are kept; a temporary directory if
            None.
        max_memory: the most that the model and its calls may take, as accelerate writes it. With device="auto" it
            also says which GPU computes: the one that it names, none if it names none.
        torch_dtype: the older name of `dtype`.
        device_map: "auto", or the device to compute on, alone or as `{"": device}`. The policy places weights.
        revision, token, cache_dir, local_files_only: of a download, see `HubOptions`.
        trust_remote_code: False; code of a repository is never run.

        Raises PolicyError, ModelError, CheckpointError, RequestError and CapacityError, before a byte moves;
        UnsupportedError for other arguments of transformers, with what to do instead, TypeError for unknown ones.
        """
        refuse_arguments(others, cls.from_pretrained)
        refuse_remote_code(trust_remote_code)
        dtype = read_dtype(dtype, torch_dtype)
        device, limits = read_max_memory(max_memory, read_device_map(device_map, device))
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        # Bars are shown as transformers shows its own: on a terminal, unless they are switched off there.
        progress = None if is_progress_bar_enabled() else False
        lm = OptLM(
            path_or_id, policy, device=device, dtype=dtype, offload_dir=offload_folder, max_memory=limits,
            progress=progress, hub=hub,
        )  # fmt: skip
        directory = lm.tokenizer_dir
        config = AutoConfig.from_pretrained(directory)
        config.name_or_path = str(path_or_id)
        try:
            generation_config = GenerationConfig.from_pretrained(directory)
        except OSError:  # it has no file of its own
            generation_config = GenerationConfig.from_model_config(config)
        return cls(lm, config, generation_config)

    def close(self) -> None:
        """Free files, threads and memory."""
        self.lm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        return_dict: bool | None = True,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (batch, seq, vocab) of every position, of the last `logits_to_keep` or of those it indexes.

        attention_mask: (batch, seq), 0 for padding at either end of a row; all positions count without it.
        labels: (batch, seq) ids, -100 for positions without one; the loss is the mean over the tokens of a row
            that follow another one, padding left out.
        output_hidden_states: embeddings, what each layer gives, the last one's behind the final norm.

        Logits and hidden states are 0 in the padding. Raises UnsupportedError, RequestError (a row number with a
        mask that is all zero or has a hole) and CapacityError before any work.
        """
        _refuse(others, _UNSUPPORTED_OF_FORWARD)
        if unknown := others.keys() - _UNSUPPORTED_OF_FORWARD.keys():
            raise TypeError(f"forward got unexpected arguments: {', '.join(sorted(unknown))}")
        request = self._request(input_ids, attention_mask)
        whole = attention_mask is None or bool(torch.as_tensor(attention_mask)[:, -1].all())
        # A right-padded row's last logits are not those of the last column.
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1 and whole and labels is None
        if labels is not None:
            check_labels(labels, tuple(input_ids.shape), self.lm.spec.vocab_size)
        result = self.lm.forward_with(request, last_only, bool(output_hidden_states))
        back = input_ids.device
        logits, loss = result.logits, None
        if labels is not None:
            loss = loss_of(logits, labels.cpu(), request).to(back)
        if not isinstance(logits_to_keep, int):
            logits = logits[:, torch.as_tensor(logits_to_keep, device="cpu")]
        elif not last_only:
            logits = logits[:, -logits_to_keep:]  # all of them for 0
        hidden = tuple(states.to(back) for states in result.hidden) if output_hidden_states else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits.to(back), hidden_states=hidden)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """`GenerationMixin.generate`, with its arguments, on the block schedule: (batch, prompt_len + new) ids.

        Without a length in the arguments or a generation config, 50 new tokens, or as many as there are positions
        for. Without ids, a row begins with the model's bos. A row that has ended is padded. Logits processors and
        stopping criteria of your own are called with all rows at every step, as in transformers, and the call runs
        in one block.

        Raises UnsupportedError for what flexgen does not do, ValueError (RequestError is one) for arguments that
        cannot be served and CapacityError for what does not fit, before any work; LaneError, with its cause, if a
        step, a processor or a criterion fails.
        """
        _refuse(kwargs, _UNSUPPORTED)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        longest = 1  # the bos
        if ids is not None:  # refused before anything is made of them
            longest = self._request(ids, mask).longest
        if mask is not None:
            kwargs["attention_mask"] = torch.as_tensor(mask)
        configs = [vars(config) for config in (generation_config, self.generation_config) if config]
        lengths = [
            source.get(name) for source in (kwargs, *configs) for name in ("max_new_tokens", "max_length")
        ]
        if all(length is None for length in lengths):
            room = self.lm.spec.max_positions - longest
            default = int(min(_DEFAULT_NEW_TOKENS, max(room, 1)))
            if generation_config is None:
                kwargs["max_new_tokens"] = default
            else:  # beside a config transformers wants no other argument
                generation_config = copy.copy(generation_config)
                generation_config.max_new_tokens = default
        return super().generate(inputs, generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate_batch` and its like begin with. Raises UnsupportedError."""
        raise UnsupportedError(
            "continuous batching is not supported: generate has its own schedule of batches"
        )

    # What GenerationMixin.generate asks for: the hooks below, and `forward`'s signature for the arguments it knows.
    # `_sample` is the loop of both modes that are let through.

    def _prepare_generation_config(
        self, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UnsupportedError(
                f"{mode.value.replace('_', ' ')} is not supported: flexgen samples, or takes the best"
            )
        if mode == GenerationMode.SAMPLE and 0 < (config.temperature or 1) < _LEAST_TEMPERATURE:
            raise RequestError(
                f"temperature is {config.temperature}; transformers divides scores by it, which overflows below "
                f"{_LEAST_TEMPERATURE}. Give do_sample=False, which takes the best token"
            )
        for name, reason in _UNSUPPORTED_OF_GENERATE.items():
            value = getattr(config, name, None)
            if value and (value is True or value != 1):  # a guidance of 1 is none
                raise UnsupportedError(f"{name} is not supported by generate: {reason}")
        return config, model_kwargs

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Of ids that came without a mask. Raises RequestError where it masks more than padding at the ends."""
        mask: Tensor = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        if not mask.all():
            try:
                self._request(inputs_tensor, mask)
            except RequestError as error:
                raise RequestError(
                    f"{error}. No mask was given; transformers infers one that leaves out pad_token_id = "
                    f"{int(generation_config._pad_token_tensor)} wherever it stands. Give attention_mask, "
                    "torch.ones_like(input_ids) if every id counts"
                ) from None
        return mask

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """No cache of transformers."""

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        encoder_input_ids: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        device: Any = None,
        **others: Any,
    ) -> RowProcessors:
        """Lists for rows of the call, on the compute device.

        `generate` has expanded the mask by `num_return_sequences` when it asks, `encoder_input_ids` not.
        """
        config = copy.copy(generation_config)
        if (ends := config._eos_token_tensor) is not None:
            config._eos_token_tensor = ends.to(self.device)
        mask = (model_kwargs or {}).get("attention_mask")
        repeats = config.num_return_sequences or 1

        def build(rows: Rows) -> LogitsProcessorList:
            return super(FlexGenForCausalLM, self)._get_logits_processor(
                generation_config=config,
                encoder_input_ids=encoder_input_ids[[row // repeats for row in rows]].to(self.device),
                model_kwargs={"attention_mask": None if mask is None else mask[list(rows)].to(self.device)},
                device=self.device,
                **others,
            )

        return RowProcessors(build, len(encoder_input_ids) * repeats, others.get("logits_processor") or ())

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: RowProcessors,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """What `GenerationMixin.generate` calls for greedy search and sampling, in place of its own loop."""
        request = self._request(input_ids, attention_mask)
        rows = len(input_ids)
        steps = steps_asked(stopping_criteria, input_ids.shape[1], generation_config.max_length)
        check_length(self.lm.spec, request, steps)  # before memory is taken for so many
        if streamer is not None and rows > 1:
            raise UnsupportedError(
                f"a streamer takes one row, not {rows}: blocks of rows come one after another"
            )
        asked, vocab = generation_config.return_dict_in_generate, self.lm.spec.vocab_size
        wanted = [
            name for name in ("scores", "logits") if asked and getattr(generation_config, f"output_{name}")
        ]
        records = {name: Record(rows, steps, vocab) for name in wanted}
        pad = generation_config._pad_token_tensor
        pad = pad_id(self.lm.spec) if pad is None else int(pad)
        # Both choice and listener: what it chooses by are the ids so far, which only `listen` adds.
        choice = HFChoice(
            input_ids, steps, pad, logits_processor, stopping_criteria, generation_config.do_sample, **records
        )
        listeners: list[Listener] = [choice.listen]
        if streamer is not None:
            listeners.append(lambda new: streamer.put(new.ids.clone()))
        kept = record_needs(wanted, rows, steps, vocab)
        self.lm.generate_with(request, steps, choice, listeners=listeners, kept=kept)
        if streamer is not None:
            streamer.end()
        sequences = choice.ids[:, : input_ids.shape[1] + choice.steps].to(input_ids.device)
        if not asked:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, **{name: record.taken(choice.steps) for name, record in records.items()}
        )

    def _request(self, input_ids: Any, attention_mask: Any) -> Request:
        if not isinstance(input_ids, Tensor):
            hint = "; pass a tokenizer's result as **inputs" if isinstance(input_ids, Mapping) else ""
            raise RequestError(
                f"input_ids are a {type(input_ids).__name__}; give a tensor (batch, seq){hint}"
            )
        whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return read_request(self.lm.spec, input_ids, whole)


def _refuse(given: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    for name, reason in unsupported.items():
        if given.get(name) is not None and given[name] is not False:
            raise UnsupportedError(f"{name} is not supported: {reason}")
