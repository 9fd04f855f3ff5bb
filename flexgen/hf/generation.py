"""`generate` with the interface of transformers: the loop for each generation mode, and the hooks of `generate`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.utils.logging import get_logger

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.errors import RequestError, UnsupportedError
from flexgen.hf.id_cache import CACHE_NAME, IdCache, read_cache
from flexgen.hf.processors import RowProcessors
from flexgen.hf.steps import HFChoice, IdsSoFar, Record, record_needs, steps_asked
from flexgen.runtime.choice import Listener, Rows
from flexgen.runtime.request import Request, check_length, pad_id, read_request

_log = get_logger(__name__)

_LEAST_TEMPERATURE = 1e-30
_DEFAULT_NEW_TOKENS = 50

UNSUPPORTED = {
    "inputs_embeds": "pass input_ids",
    "output_attentions": "flexgen never stores whole attention matrices",
    "position_ids": "positions are computed from the attention mask",
}
"""Unsupported arguments of both `forward` and `generate`, with the reasons."""

_UNSUPPORTED_ARGUMENTS = UNSUPPORTED | {
    "custom_generate": "flexgen runs only transformers' own generation modes",
    "negative_prompt_ids": "flexgen has no guidance",
}

_UNSUPPORTED_SETTINGS = {
    "output_attentions": UNSUPPORTED["output_attentions"],
    "guidance_scale": "it would run the model twice in each step",
    "assistant_early_exit": "it would run only some of the layers; pass a smaller model as assistant_model",
    "token_healing": "it rewrites the prompts before the call with its own beam searches",
    "use_mtp": "flexgen does not load the layers for multi-token prediction",
}
"""Unsupported fields of a generation config, with the reasons."""

_IN_BLOCKS = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
_RECOMPUTED = GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE


class Generation(GenerationMixin):
    """`GenerationMixin` for a model whose forward passes are computed by `lm`.

    Greedy search and sampling run in flexgen's block schedule, with its KV cache. The other modes run in the loops of
    transformers, on `forward` with an `IdCache`: each step computes all positions again.
    """

    lm: OptLM
    generation_config: GenerationConfig

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, with its arguments and results: (batch, prompt_len + new) ids by default.

        Greedy search and sampling run in flexgen's block schedule. Beam search and assisted generation run in the
        loops of transformers, without a KV cache: each step computes all positions again.

        If neither the arguments nor a generation config set a length, the call generates 50 tokens, or fewer if the
        model has no positions for them. Without ids, a row begins with the model's BOS token. Finished rows are
        padded. Your own logits processors and stopping criteria are called with all rows at every step, as in
        transformers, and the call then runs in one block.

        Raises, before any work: UnsupportedError for an unsupported feature, ValueError (or its subclass
        RequestError) for invalid arguments, and CapacityError if the call does not fit. Raises LaneError, with its
        cause, if a step, a processor or a criterion fails in the block schedule.
        """
        refuse(kwargs, _UNSUPPORTED_ARGUMENTS)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        cache = read_cache(**{name: kwargs.get(name) for name in ("cache", "past_key_values")})
        longest = 1  # the BOS token
        if ids is not None:  # validate before any work
            longest = read_ids(self.lm, ids, mask).longest
            if cache is not None and cache.get_seq_length() >= ids.shape[1]:
                raise RequestError(
                    f"input_ids have {ids.shape[1]} positions and the cache has {cache.get_seq_length()}; "
                    "pass all ids to generate, including those in the cache"
                )
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
            else:  # transformers does not accept other arguments together with a config
                generation_config = copy.copy(generation_config)
                generation_config.max_new_tokens = default
        return super().generate(inputs, generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Called first by `generate_batch` and related methods. Raises UnsupportedError."""
        raise UnsupportedError(
            "continuous batching is not supported: call generate with all prompts, which has its own schedule"
        )

    # The hooks of GenerationMixin.generate, in the order of their calls.

    def _prepare_generation_config(
        self, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        for name, reason in _UNSUPPORTED_SETTINGS.items():
            value = getattr(config, name, None)
            if value and (
                value is True or name != "guidance_scale" or value != 1
            ):  # guidance 1 has no effect
                raise UnsupportedError(f"{name} is not supported by generate: {reason}")
        mode = config.get_generation_mode()
        if mode not in (*_IN_BLOCKS, *_RECOMPUTED, GenerationMode.ASSISTED_GENERATION):
            raise UnsupportedError(
                f"{mode.value.replace('_', ' ')} is not supported: transformers loads its code from a repository, "
                "and flexgen never runs code from a repository. Supported: greedy search, sampling, beam search, "
                "beam sampling and assisted generation"
            )
        if config.do_sample and 0 < (config.temperature or 1) < _LEAST_TEMPERATURE:
            raise RequestError(
                f"temperature is {config.temperature}; it must be at least {_LEAST_TEMPERATURE}, because "
                "transformers divides scores by it. For the most probable token, use do_sample=False"
            )
        return config, model_kwargs

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """The mask for ids without one. Raises RequestError if it masks more than padding at the ends."""
        # The main model's mask was dropped, because every position counts.
        if generation_config.is_assistant:
            return torch.ones_like(inputs_tensor)
        mask: Tensor = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        if not mask.all():
            try:
                read_ids(self.lm, inputs_tensor, mask)
            except RequestError as error:
                raise RequestError(
                    f"{error}. No mask was given, so transformers masks every pad_token_id = "
                    f"{int(generation_config._pad_token_tensor)}. Pass attention_mask, or "
                    "torch.ones_like(input_ids) if every id counts"
                ) from None
        return mask

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mode: GenerationMode,
        *args: Any,
    ) -> None:
        """Create an `IdCache` for the loops of transformers. The block schedule has its own cache."""
        model_kwargs.pop(CACHE_NAME, None)  # the caller passed all ids, including those in the cache
        if mode not in _IN_BLOCKS and generation_config.use_cache:
            model_kwargs[CACHE_NAME] = IdCache()

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        encoder_input_ids: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        device: Any = None,
        **others: Any,
    ) -> RowProcessors:
        """The list for the loops of transformers, and lists for some rows of the call, on the compute device.

        At this point `generate` has expanded the mask by `num_return_sequences`, but not `encoder_input_ids`.
        """
        made = super()._get_logits_processor(
            generation_config=generation_config,
            encoder_input_ids=encoder_input_ids,
            model_kwargs=model_kwargs,
            device=device,
            **others,
        )
        config = copy.copy(generation_config)
        if (ends := config._eos_token_tensor) is not None:
            config._eos_token_tensor = ends.to(self.device)
        mask = (model_kwargs or {}).get("attention_mask")
        repeats = config.num_return_sequences or 1

        def build(rows: Rows) -> LogitsProcessorList:
            return super(Generation, self)._get_logits_processor(
                generation_config=config,
                encoder_input_ids=encoder_input_ids[[row // repeats for row in rows]].to(self.device),
                model_kwargs={"attention_mask": None if mask is None else mask[list(rows)].to(self.device)},
                device=self.device,
                **others,
            )

        return RowProcessors(made, build, others.get("logits_processor") or ())

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
        """Greedy search and sampling, in the block schedule."""
        request = read_ids(self.lm, input_ids, attention_mask)
        rows = len(input_ids)
        steps = steps_asked(stopping_criteria, input_ids.shape[1], generation_config.max_length)
        check_length(self.lm.spec, request, steps)  # before memory is allocated for the steps
        if streamer is not None and rows > 1:
            raise UnsupportedError(
                f"a streamer is not supported with {rows} rows, only with one: pass one prompt at a time"
            )
        asked, vocab = generation_config.return_dict_in_generate, self.lm.spec.vocab_size
        wanted = [
            name for name in ("scores", "logits") if asked and getattr(generation_config, f"output_{name}")
        ]
        records = {name: Record(rows, steps, vocab) for name in wanted}
        pad = generation_config._pad_token_tensor
        pad = pad_id(self.lm.spec) if pad is None else int(pad)
        with_hidden = asked and generation_config.output_hidden_states
        if with_hidden:
            _refuse_right_padding(attention_mask)
            if not 0 <= pad < vocab:
                raise RequestError(
                    f"pad_token_id is {pad}, but the vocabulary is 0 to {vocab - 1}; the hidden states of finished "
                    "rows are computed from pad_token_id. Give an id of the vocabulary"
                )
            self.lm.check_forward(_lengthened(request, steps - 1), last_only=True, hidden_states=True)
        ids = IdsSoFar(input_ids, steps, pad)
        choice = HFChoice(ids, logits_processor, stopping_criteria, generation_config.do_sample, **records)
        listeners: list[Listener] = [ids.add]
        if streamer is not None:
            listeners.append(lambda new: streamer.put(new.ids.clone()))
        needs = record_needs(wanted, rows, steps, vocab)
        self.lm.generate_with(Completion(request, steps, choice), listeners=listeners, extra_needs=needs)
        if streamer is not None:
            streamer.end()
        sequences = ids.sequences().to(input_ids.device)
        if not asked:
            return sequences
        hidden = None
        if with_hidden:
            hidden = self._hidden_states(sequences, attention_mask, ids.steps, generation_config.use_cache)
        output = GenerateDecoderOnlyOutput(
            sequences=sequences,
            hidden_states=hidden,
            **{name: record.taken(ids.steps) for name, record in records.items()},
        )
        if generation_config.is_assistant:  # the caller's loop updates the mask only if there is a cache
            output[CACHE_NAME] = IdCache(sequences[:, :-1].cpu())
        return output

    def _hidden_states(
        self, sequences: Tensor, mask: Tensor | None, steps: int, one_position: bool
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The hidden states of each of `steps` in the form of transformers, from one forward pass over finished rows.

        The first step has all positions of the prompt. Each later step has only its newest position if
        `one_position`, as with a cache, otherwise all positions so far.
        """
        last = sequences.shape[1] - 1
        stats = self.lm.stats
        states = self.lm.forward_with(
            read_ids(self.lm, sequences[:, :-1], _with_new(mask, last)), last_only=True, hidden_states=True
        ).hidden
        self.lm.stats = stats  # restore the statistics of the generation
        prompt = last - steps + 1
        return tuple(
            tuple(
                layer[:, (end - 1 if one_position and end > prompt else 0) : end].to(sequences.device)
                for layer in states
            )
            for end in range(prompt, last + 1)
        )

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._begin_recomputing("beam search", input_ids, kwargs)
        return super()._beam_search(input_ids, *args, **kwargs)

    def _assisted_decoding(
        self, input_ids: Tensor, *args: Any, inputs_tensor: Tensor | None = None, **kwargs: Any
    ) -> Any:
        # `generate` passes `inputs_tensor` if it is in the signature.
        self._begin_recomputing("assisted generation", input_ids, kwargs, last_only=False)
        return super()._assisted_decoding(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)

    def _begin_recomputing(
        self, mode: str, input_ids: Tensor, arguments: Mapping[str, Any], last_only: bool = True
    ) -> None:
        """Check the largest forward pass of a loop of transformers before the first one runs.

        Raises RequestError for too many positions and for padding on the right, and CapacityError if the pass does
        not fit.
        """
        config, mask = arguments["generation_config"], arguments.get("attention_mask")
        _refuse_right_padding(mask)
        request = read_ids(self.lm, input_ids, mask)
        steps = max(config.max_length - input_ids.shape[1], 1)
        check_length(self.lm.spec, request, steps)
        hidden = bool(config.return_dict_in_generate and config.output_hidden_states)
        self.lm.check_forward(_lengthened(request, steps - 1), last_only, hidden)
        _log.warning_once(
            f"{mode} has no KV cache in flexgen, so each step computes all positions again. Greedy search and "
            "sampling use a cache"
        )


def read_ids(lm: OptLM, input_ids: Any, attention_mask: Any) -> Request:
    """Check ids (batch, seq) and a mask of that shape. Without a mask, all positions count. Raises RequestError."""
    if not isinstance(input_ids, Tensor):
        hint = "; pass the tokenizer's result as **inputs" if isinstance(input_ids, Mapping) else ""
        raise RequestError(f"input_ids are a {type(input_ids).__name__}; give a tensor (batch, seq){hint}")
    if input_ids.is_meta:
        raise RequestError(
            "input_ids are on the meta device and have no values; move them to model.device or leave them on the CPU"
        )
    whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return read_request(lm.spec, input_ids, whole)


def refuse(given: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    """Raise UnsupportedError for an argument in `unsupported` that is not None and not False."""
    for name, reason in unsupported.items():
        if given.get(name) is not None and given[name] is not False:
            raise UnsupportedError(f"{name} is not supported: {reason}")


def _refuse_right_padding(mask: Tensor | None) -> None:
    if mask is not None and not (ends := mask[:, -1].bool()).all():
        raise RequestError(
            f"row {int((~ends).nonzero()[0])} is padded on the right, so new tokens would follow the padding. "
            "Pad on the left: tokenizer.padding_side = 'left'"
        )


def _with_new(mask: Tensor | None, width: int) -> Tensor | None:
    """The mask of the prompts, extended with ones to `width` positions."""
    if mask is None:
        return None
    return torch.cat([mask, mask.new_ones(len(mask), width - mask.shape[1])], dim=1)


def _lengthened(request: Request, new: int) -> Request:
    """The request with `new` more positions in each row. Its ids are placeholders that take no memory."""
    longer = (np.broadcast_to(np.int64(0), len(prompt) + new) for prompt in request.prompts)
    return replace(request, prompts=tuple(longer), width=request.width + new)
