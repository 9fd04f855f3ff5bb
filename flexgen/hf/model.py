"""`FlexGenForCausalLM`: an `OptLM` with the interface of a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.logging import is_progress_bar_enabled

from flexgen.engine.model import OptLM
from flexgen.errors import UnsupportedError
from flexgen.hf.generation import UNSUPPORTED, Generation, read_ids, refuse
from flexgen.hf.id_cache import CACHE_NAME, IdCache, read_cache
from flexgen.hf.loading import read_device_map, read_dtype, refuse_arguments, refuse_remote_code
from flexgen.hf.loss import check_labels, loss_of
from flexgen.hf.max_memory import read_max_memory
from flexgen.hf.pretrained import Pretrained
from flexgen.models import HubOptions
from flexgen.models.folders import GGUF_SUFFIX
from flexgen.models.gguf_families import config_from_gguf
from flexgen.policy import Policy


class FlexGenForCausalLM(Pretrained, Generation, GenerationMixin):
    """A causal LM with the interface of a transformers model, which may be larger than device memory.

    `generate` is `GenerationMixin.generate`: transformers reads the arguments and the generation config and creates
    processors and criteria, and flexgen computes (see `Generation`). `lm` is the `OptLM` below it, with the policy
    and the statistics of the last call. Use the model as a context manager, or call `close`.
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
        """Open a model. See `OptLM` for `policy`, `device` and `dtype`.

        offload_folder: the directory of the disk tier; None for a temporary directory.
        max_memory: the maximum memory for the model and its calls, in the form of accelerate. With
            device="auto" it also chooses the compute device: the GPU that it names, or the CPU if it names none.
        torch_dtype: the older name of `dtype`.
        device_map: "auto", or the compute device, alone or as `{"": device}`. The policy places the weights.
        revision, token, cache_dir, local_files_only: options of a download; see `HubOptions`.
        trust_remote_code: must be false; code from a repository is never run.

        Raises PolicyError, ModelError, CheckpointError, RequestError and CapacityError before any data is moved.
        Raises UnsupportedError, with an alternative, for other arguments of transformers, and TypeError for unknown
        ones.
        """
        refuse_arguments(others, cls.from_pretrained)
        refuse_remote_code(trust_remote_code)
        dtype = read_dtype(dtype, torch_dtype)
        device, limits = read_max_memory(max_memory, read_device_map(device_map, device))
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        # Show progress bars like transformers: on a terminal, unless they are disabled there.
        progress = None if is_progress_bar_enabled() else False
        lm = OptLM(
            path_or_id, policy, device=device, dtype=dtype, offload_dir=offload_folder, max_memory=limits,
            progress=progress, hub=hub,
        )  # fmt: skip
        config, directory = _config(lm.tokenizer_dir)
        config.name_or_path = str(path_or_id)
        try:
            generation_config = GenerationConfig.from_pretrained(directory)
        except OSError:  # the model has no generation config
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
        output_hidden_states: bool | None = False,
        return_dict: bool | None = True,
        use_cache: bool | None = False,
        cache: IdCache | None = None,
        past_key_values: IdCache | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits (batch, seq, vocab).

        attention_mask: (batch, seq), 0 for padding at either end of a row. Without it, all positions count.
        labels: (batch, seq) ids, -100 for positions without a label. The loss is the mean over all labels that follow
            another token of their row, without padding.
        logits_to_keep: the number of last positions to return, or the indices of the positions; 0 for all.
        output_hidden_states: also return the embeddings and the output of each layer, the last one after the final
            norm.
        use_cache: also return a `cache`, which contains ids in place of keys and values.
        cache: the cache of an earlier pass. `input_ids` follow its ids, `attention_mask` covers both, and the results
            are those of `input_ids`. All positions are computed again.
        past_key_values: the older name of `cache`.
        cache_position: (seq,), the numbers of the positions after those of the cache.

        Logits and hidden states of padding are 0. Raises before any work: UnsupportedError, CapacityError, and
        RequestError, with the number of the row, for a mask that is all zero or has a hole.
        """
        refuse(others, UNSUPPORTED)
        if unknown := others.keys() - UNSUPPORTED.keys():
            raise TypeError(f"forward() got unexpected arguments: {', '.join(sorted(unknown))}")
        cache = read_cache(cache=cache, past_key_values=past_key_values)
        ids = input_ids if cache is None else cache.with_new(input_ids)
        request = read_ids(self.lm, ids, attention_mask)
        new, past = input_ids.shape[1], ids.shape[1] - input_ids.shape[1]
        if cache_position is not None and cache_position.tolist() != list(range(past, past + new)):
            raise UnsupportedError(
                f"cache_position must be the numbers from {past} to {past + new - 1}, which follow the cache; leave "
                "it out"
            )
        if labels is not None:
            if past:
                raise UnsupportedError("labels are not supported with a cache: pass all ids and all labels")
            check_labels(labels, tuple(input_ids.shape), self.lm.spec.vocab_size)
        whole = attention_mask is None or bool(torch.as_tensor(attention_mask)[:, -1].all())
        one = isinstance(logits_to_keep, int) and (logits_to_keep == 1 or new == 1)
        # The last logits of a right-padded row are not in the last column.
        last_only = one and whole and labels is None
        result = self.lm.forward_with(request, last_only, bool(output_hidden_states))
        back = input_ids.device
        logits, loss = result.logits, None
        if labels is not None:
            loss = loss_of(logits, labels.cpu(), request).to(back)
        if not last_only:
            logits = logits[:, past:]
        if not isinstance(logits_to_keep, int):
            logits = logits[:, torch.as_tensor(logits_to_keep, device="cpu")]
        elif not last_only:
            logits = logits[:, -logits_to_keep:]  # all of them for 0
        output = CausalLMOutputWithPast(loss=loss, logits=logits.to(back))
        if use_cache or cache is not None:
            cache = IdCache() if cache is None else cache
            cache.ids = ids.to("cpu", torch.int64)
            output[CACHE_NAME] = cache
        if output_hidden_states:
            output["hidden_states"] = tuple(states[:, past:].to(back) for states in result.hidden)
        return output.to_tuple() if return_dict is False else output


def _config(place: Path | None) -> tuple[PreTrainedConfig, Path | None]:
    """The config of a model in a directory or a GGUF file, and the directory."""
    if place is not None and place.suffix == GGUF_SUFFIX:
        return config_from_gguf(place), place.parent
    return AutoConfig.from_pretrained(place), place
