"""A text whose KV cache is kept between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flexgen.engine.calls import CallPlans
from flexgen.engine.completion import Completion
from flexgen.engine.conveniences import Conveniences
from flexgen.errors import CapacityError, RequestError
from flexgen.layout.needs import MemoryPlan
from flexgen.policy import Tier
from flexgen.results.report import Report
from flexgen.runtime.buffers import Buffers
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Choice, Listener
from flexgen.runtime.model import Model
from flexgen.runtime.request import Request, check_whole, read_request
from flexgen.runtime.stats import Meter
from flexgen.runtime.tokens import NewTokens
from flexgen.workload import Workload


@dataclass(frozen=True)
class CachedText:
    """The text whose keys and values are in a cache.

    ids: the ids whose keys and values are valid, int64.
    length: the tokens in the cache, which may have invalid ones after the ids.
    """

    ids: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    length: int = 0


class Conversation(Conveniences):
    """One text, whose KV cache is kept between calls: a call computes only the tokens that the cache does not have.

    You pass the whole text to each call, and get the ids that a call of the model would return. A call reuses the
    cache for the tokens that the text has in common, from its start, with the last call's text and completion.
    `stream`, `stream_text` and `generate_text` take one prompt.

    Between calls the cache stays in memory, and the plans of the model's other calls count it. If a text exceeds the
    cache, a new cache of twice the size of the text is made, and the whole text is computed again. The whole text is
    also computed again after a call that failed or was interrupted. Close the conversation or the model to free the
    memory.
    """

    def __init__(
        self, lm: Conveniences, opened: Callable[[], Model], plans: CallPlans, meter: Meter, room: int
    ) -> None:
        """room: the minimum number of tokens that the cache has room for."""
        super().__init__()
        self.spec, self.tokenizer_dir = lm.spec, lm.tokenizer_dir
        check_whole("room", room, 1)
        self._least = room
        self._lm = lm
        self._opened = opened
        self._plans = plans
        self._meter = meter
        self._buffers = Buffers()
        self._room: tuple[Model, Workload, MemoryPlan] | None = None
        self._text = CachedText()
        # Frees the memory of a conversation that is dropped without `close`, while the model is still in use.
        self._finalizer = weakref.finalize(self, plans.forget, self._buffers)

    @property
    def cached(self) -> np.ndarray:
        """The ids, int64, whose keys and values are in the cache."""
        return self._text.ids.copy()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._lm.tokenizer

    def generate(
        self, ids: Sequence[int] | np.ndarray | Tensor, max_new_tokens: int = 32, **sampling: Any
    ) -> np.ndarray:
        """Return the text and its completion, which ends with the stop id if there is one: int64 (tokens,).

        ids: the whole text so far, such as `[*before, *more]`, where the last call returned `before`.
        max_new_tokens: the number of tokens to generate.
        sampling: do_sample, temperature, stop, top_k, top_p and seed, as in `OptLM.generate`.

        Raises as `OptLM.generate` does.
        """
        rows: Any = [ids]
        request = read_request(self.spec, rows, np.ones((1, len(ids))) if len(ids) else None)
        out = self.generate_with(Completion(request, max_new_tokens, self.sampled(**sampling)))
        assert self.stats is not None
        made: np.ndarray = out[0, : request.width + self.stats.new_tokens]
        return made

    def generate_with(
        self,
        completion: Completion,
        *,
        listeners: Sequence[Listener] = (),
        check: Callable[[], object] | None = None,
    ) -> np.ndarray:
        """`OptLM.generate_with` for a request of one prompt.

        Raises RequestError for more prompts, or if the conversation is closed.
        """
        request, choice, tokens = completion.request, completion.choice, completion.run
        self._check(request, choice)
        completion.check(self.spec)
        prompt, pad = request.prompts[0], completion.pad_id(self.spec)
        self._opened()  # raises if the model is closed
        (model, workload, plan), grows = self._room_for(len(prompt) + completion.most)
        device, buffers = model.machine.device, self._buffers
        out = completion.blank(pad)
        call = Call(model, workload, pad, check, plan.workspace(Tier.GPU), buffers)
        with device.active(), torch.inference_mode(), call, call:
            cached, length = self._usable(prompt), self._text.length
            # The contents of the buffers are unknown until the call has succeeded.
            self._text = CachedText()
            if grows:
                self._plans.forget(buffers)
                self._room = model, workload, plan
                self._plans.remember(buffers, plan)
                cached = 0
            if cached and buffers.block is not None:
                if buffers.block.cache.can_cut(length, cached):
                    buffers.block.cache.cut(length, cached)
                else:  # layers with a window have overwritten tokens that are needed again
                    cached = 0
            prompts = call.prepare([prompt[cached:]], cached)
            output = NewTokens(prompts, tokens, choice, [0], listeners)
            call.run(prompts, tokens, output)
            ids = output.ids[0].numpy()
            out[0, request.width : request.width + tokens] = ids
            length = len(prompt) + call.timing.ran[-1] - 1  # the last id has no keys and values
            self._text = CachedText(np.concatenate([prompt, ids[: output.count]])[:length], length)
            new = replace(request, prompts=(prompt[cached:],))
            self._lm.stats = self.stats = self._meter.stats(model, call, plan, new, output.count)
        return out

    def _check(self, request: Request, choice: Choice) -> None:
        if not self._finalizer.alive:
            raise RequestError("this conversation is closed; start another one with conversation()")
        if len(request.prompts) != 1:
            raise RequestError(
                f"this call of a conversation has {len(request.prompts)} prompts; it takes 1: pass one, or call the "
                "model instead"
            )
        if choice.whole_call:
            raise RequestError(
                "a conversation does not support a choice of ids that sees a whole call: call the model instead"
            )

    def _room_for(self, tokens: int) -> tuple[tuple[Model, Workload, MemoryPlan], bool]:
        """The model, workload and plan of a text, and whether it needs new buffers. Raises CapacityError."""
        if self._room is not None and tokens <= self._room[1].capacity:
            return self._room, not self._buffers.batches
        roomy = int(min(max(2 * tokens, self._least), self.spec.longest_text))
        try:
            return self._planned(roomy), True
        except CapacityError:
            return self._planned(tokens), True

    def _planned(self, capacity: int) -> tuple[Model, Workload, MemoryPlan]:
        workload = Workload(max(capacity - 1, 1), 1, 1)
        chosen, plan = self._plans.of_text(workload, self._buffers)
        return replace(self._opened(), policy=chosen.policy, order=chosen.order), workload, plan

    def _usable(self, prompt: np.ndarray) -> int:
        """The number of tokens of a text to take from the cache. The last one is always computed, for its logits."""
        before = self._text.ids
        shared = min(len(before), len(prompt) - 1)
        unlike = np.flatnonzero(before[:shared] != prompt[:shared])
        longest = max(self._text.length, len(prompt))
        if self.spec.stretches(longest):
            return 0  # the rotary frequencies of all keys change with the length of the text
        return int(unlike[0]) if len(unlike) else shared

    def close(self) -> None:
        """End a running stream and free the memory."""
        if not self._opened_elsewhere():
            self._end_streams()
            self._finalizer()

    def _opened_elsewhere(self) -> bool:
        """Whether this process is a fork of the one that owns the memory."""
        return self._plans.in_use.inherited

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Delegated to the model

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """`OptLM.forward`, without the cache."""
        return self._lm.forward(*args, **options)

    def sampled(self, *args: Any, **sampling: Any) -> Choice:
        """`OptLM.sampled`."""
        return self._lm.sampled(*args, **sampling)

    def last_report(self, request: Request, max_new_tokens: int, tokens: int) -> Report:
        """`OptLM.last_report`."""
        return self._lm.last_report(request, max_new_tokens, tokens)
