"""`OptLM`: a model opened on a machine with a policy, and its calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flexgen.engine.calls import Wanted
from flexgen.engine.completion import Completion, workload_of
from flexgen.engine.conveniences import Conveniences
from flexgen.engine.conversation import Conversation
from flexgen.engine.opening import Place, open_weights, read_policy
from flexgen.errors import RequestError
from flexgen.layout.limits import read_limits
from flexgen.layout.needs import MemoryPlan, Need
from flexgen.layout.placement import Placement
from flexgen.memory.device import ComputeDevice
from flexgen.memory.machine import Machine
from flexgen.models import HubOptions, Layer, open_model
from flexgen.policy import Auto, Policy, Tier
from flexgen.results.report import Report
from flexgen.results.trace import LaneName, Phase
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Choice, Listener, Sampled, limited
from flexgen.runtime.debug import order_to_run, summary, tokens_to_run
from flexgen.runtime.draws import MAX_SEED
from flexgen.runtime.lane_timing import lane_seconds
from flexgen.runtime.model import Model
from flexgen.runtime.positions import Forward, hidden_needs
from flexgen.runtime.prefix_groups import PrefixGroup
from flexgen.runtime.request import (
    IdRows,
    NewTokenCounts,
    Request,
    check_bool,
    check_positions,
    check_whole,
    new_token_counts,
    pad_id,
    read_request,
    stop_ids,
)
from flexgen.runtime.sampler import check_sampling, check_seed
from flexgen.runtime.stats import Meter
from flexgen.runtime.tokens import NewTokens, WholeCallTokens, whole_call_needs
from flexgen.schedule.orders import check_order
from flexgen.workload import Workload

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig


class OptLM(Conveniences):
    """A language model that may be larger than its device's memory.

    model: "demo", a Hugging Face model directory, a GGUF file, a hub id, a known name or a transformers config.
    policy: a `Policy`, the path of its TOML file, "auto", or `Auto(...)` with some fields given. "auto" measures the
        machine once and searches for the fastest policy. A call of another workload may get another policy, with the
        weights in the same places.
    workload: the workload of that search. None: 256 prompts of 512 tokens, with 32 new tokens each.
    device: "auto", "cpu", "cuda", "cuda:0", "emulated" or "emulated:memory=1GiB,link=8GiB,disk=2GiB".
    dtype: the dtype of arithmetic, weights and cache: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
    offload_dir: the directory for data on disk. Later openings reuse its converted weights. None: a temporary one.
    fast_start: whether to map weights in memory from files, and to store converted ones in offload_dir for that.
    weights: "checkpoint" loads the model's weights; a `Path` loads them from that directory instead. "dummy" makes
        random weights of the same shapes and does not use the network.
    progress: whether to show progress bars for loading and generation; None shows them on a terminal only.
    order: the name of an order that replaces the policy's own.
    num_layers: the number of layers to open, from the first; for trials only, because the output is meaningless.
    max_memory: for each tier, the maximum bytes that the model and its calls may use. Default: all free memory.
    hub: the options for downloading a model: revision, token, cache, local files only.

    `OptLM` loads all weights. It is a context manager: its exit frees files, threads and pinned memory.

    Raises, before any data moves, PolicyError, ModelError, CheckpointError, ScheduleError (unknown or illegal order),
    RequestError (unknown device or dtype, invalid max_memory) and CapacityError (the weights do not fit).
    """

    def __init__(
        self,
        model: str | Path | PreTrainedConfig,
        policy: Policy | Auto | str | Path = "auto",
        *,
        workload: Workload | None = None,
        device: str | torch.device | ComputeDevice = "auto",
        dtype: str | torch.dtype = "auto",
        offload_dir: str | Path | None = None,
        weights: Literal["checkpoint", "dummy"] | Path = "checkpoint",
        progress: bool | None = None,
        order: str | None = None,
        num_layers: int | None = None,
        max_memory: Mapping[Tier, int] | None = None,
        hub: HubOptions | None = None,
        fast_start: bool = False,
    ) -> None:
        if order is not None:
            check_order(order)
        policy = read_policy(policy)
        super().__init__()
        self.spec, checkpoint = open_model(model, weights, hub)
        if num_layers is not None:
            check_whole("num_layers", num_layers, 1)
            self.spec = self.spec.first_layers(num_layers)
        self.tokenizer_dir = checkpoint.directory
        place = Place(device, dtype, offload_dir, read_limits(max_memory), progress, fast_start)
        self._no_bar = None if progress is None else not progress
        opened = open_weights(self.spec, checkpoint, policy, place, workload, order)
        # Frees files and threads also at exit, or if the user forgets to close the model.
        self._finalizer = opened.closed_with(self)
        self.policy, self.auto = opened.model.policy, opened.plans.auto
        self._plans = opened.plans
        self._meter = Meter(self._machine, self.placement.nbytes[Tier.DISK], opened.resident_before)
        self._model: Model | None = opened.model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of arithmetic, weights and cache."""
        return self._plans.placement.dtype

    @property
    def placement(self) -> Placement:
        """The tier and codec of each weight."""
        return self._plans.placement

    @property
    def _layers(self) -> Sequence[Layer]:
        return self._plans.layers

    @property
    def _machine(self) -> Machine:
        return self._plans.machine

    @property
    def device(self) -> str:
        """The name of the compute device."""
        return self._machine.device.name

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers, indexed by `Step.layer` of traces."""
        return [layer.name for layer in self._layers]

    def memory_in_use(self) -> dict[Tier, int]:
        """Bytes in use by tier: weights, except those on disk, and the buffers and files of a running call."""
        return self._machine.in_use()

    def close(self) -> None:
        """Free files, threads and memory. The model cannot be used afterwards.

        Running streams end, and a call in another thread raises RequestError there. In a fork of the process, `close`
        does nothing, because the parent owns the resources. Raises RequestError if a call of the model calls it.
        """
        if self._plans.in_use.inherited:
            return
        self._plans.in_use.refuse_inside()
        self._end_streams()
        try:
            self._finalizer()
        finally:  # also after Ctrl-C
            self._model = None  # drops the last references to weights and slots,
            self._machine.device.close()  # so that a GPU's memory can be freed here

    def _opened(self) -> Model:
        self._plans.in_use.refuse_closed()
        assert self._model is not None
        return self._model

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise RequestError: threads, open files and memory can be neither pickled nor copied."""
        raise RequestError(
            "an OptLM can be neither pickled nor copied, it holds threads, open files and memory: pass its arguments "
            "(the model's name and the Policy, which can be pickled) and call OptLM(...) in the worker"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # The other arguments are those of the implementation.
    @overload
    def generate(self, *args: Any, stats: Literal[False] = False, **options: Any) -> np.ndarray: ...

    @overload
    def generate(self, *args: Any, stats: Literal[True], **options: Any) -> tuple[np.ndarray, Report]: ...

    def generate(  # type: ignore[misc]
        self,
        inputs: IdRows,
        max_new_tokens: NewTokenCounts = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: int | Iterable[int] | None = None,
        debug_mode: str | None = None,
        cut_gen_len: int | None = None,
        verbose: int = 0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        attention_mask: Any = None,
        seed: int | None = None,
        first_row: int | Sequence[int] = 0,
        stats: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, Report]:
        """Return the prompts and their completions: (prompts, prompt_len + max_new_tokens) int64.

        inputs: ids as an array or tensor (prompts, prompt_len), or a list of id lists of any lengths. The number of
            prompts is not limited. Shorter prompts are padded on the left, also in the result.
        max_new_tokens: the number of tokens to generate for each prompt, or a sequence of one number per prompt.
        do_sample: True draws each token; False takes the most probable token.
        temperature, top_k, top_p: the distribution of the draws, see `sample`.
        stop: the id or ids that end a row. None is the model's end ids; `()` never stops. Pad ids follow the stop id.
        debug_mode: "fewer_batch" generates a few tokens only and prints projected times. "breakdown" also runs one
            step at a time (order "normal") and prints the time of each operation.
        cut_gen_len: the tokens to generate in a benchmark, at least 2 with `stats`; pad ids replace the others.
        verbose: a value above 0 prints a summary of the call to stderr.
        attention_mask: (prompts, prompt_len), with 0 for padding at either end of a row. Without a mask, pad ids at
            the start of a row of a rectangular input are padding.
        seed: None chooses a random one. A draw depends only on the seed and on the numbers of prompt and token.
            Calls, policies, orders and devices do not change the samples of a job, except by rounding of the logits.
        first_row: the number of the first prompt in a job of several calls, or the numbers of all prompts.
        stats: whether to return the call's `Report` too, with its times and the placement of its data.

        Raises RequestError (invalid arguments) and CapacityError (the call does not fit) before any work, and
        LaneError, with its cause, if a step fails.
        """
        request = read_request(self.spec, inputs, attention_mask)
        counts = new_token_counts(self.spec, request, max_new_tokens)
        choice = self.sampled(
            do_sample, temperature, stop, top_k=top_k, top_p=top_p, seed=seed, first_row=first_row
        )
        tokens = tokens_to_run(most := max(counts), cut_gen_len, debug_mode, projected=stats)
        check_whole("verbose", int(verbose) if isinstance(verbose, bool) else verbose, 0)
        order = order_to_run(debug_mode)
        out = self.generate_with(Completion(request, counts, limited(choice, counts), tokens), order=order)
        if (debug_mode or verbose) and (done := self.stats):
            print(summary(done.timing, len(out), done.new_tokens, tokens, most, debug_mode), file=sys.stderr)
        return (out, self.last_report(request, most, tokens)) if stats else out

    def generate_with(
        self,
        completion: Completion,
        *,
        listeners: Sequence[Listener] = (),
        extra_needs: Sequence[Need] = (),
        check: Callable[[], object] | None = None,
        order: str | None = None,
    ) -> np.ndarray:
        """`generate` with any choice of the next id.

        listeners: called with the new ids as they arrive.
        extra_needs: memory that the caller keeps for the call, in addition to the plan.
        check: called before each step; its exceptions end the call, unchanged. It disables the progress bar.
        order: the name of an order that replaces the policy's own; the model's slots must be enough for it.

        A choice with `whole_call` runs all prompts in one block. For guesses, see `Completion.guess`. Raises as
        `generate` does; an exception of the choice or of a listener is the cause of a LaneError.
        """
        completion.check(self.spec)
        request, choice, tokens = completion.request, completion.choice, completion.run
        pad, workload = completion.pad_id(self.spec), completion.workload(self.spec)
        if whole := choice.whole_call:
            topology = self._machine.device.topology
            logits = whole_call_needs(workload.num_prompts, self.spec.vocab_size, self.dtype, topology)
            extra_needs = [*extra_needs, *logits]
        wanted = Wanted(by_place=completion.may_enter_by_place, extra_needs=lambda _: extra_needs)
        groups, model, plan = self._prepared(request, workload, wanted, whole)
        model = model if order is None else replace(model, order=order)
        out, new_tokens = completion.blank(pad), 0
        no_bar = self._no_bar if check is None else True
        bar = tqdm(total=len(out) * tokens, desc="tokens", unit="token", disable=no_bar, leave=False)
        all_listeners = [lambda new: bar.update(len(new.rows)), *listeners]
        active, reserve = self._machine.device.active(), plan.workspace(Tier.GPU)
        with bar, active, torch.inference_mode(), (call := Call(model, workload, pad, check, reserve)), call:
            kind, waits = WholeCallTokens if whole else NewTokens, completion.ends_rows_apart(model.policy)
            for rows, prompts in call.blocks(request, groups, waits=waits):
                prompts.guesses = completion.guesses(rows, model.policy)
                output = kind(prompts, tokens, choice, rows, all_listeners)
                call.run(prompts, tokens, output)
                out[rows, request.width : request.width + tokens] = output.ids.numpy()
                new_tokens += output.count
            self.stats = self._meter.stats(model, call, plan, request, new_tokens)
        return out

    def sampled(
        self,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: int | Iterable[int] | None = None,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        first_row: int | Sequence[int] = 0,
    ) -> Choice:
        """The choice of the next id that `generate` uses with these arguments. Raises RequestError."""
        self._opened()
        check_bool("do_sample", do_sample)
        check_sampling(temperature, top_k, top_p)
        check_seed(seed)
        for number in first_row if isinstance(first_row, Sequence) else [first_row]:
            check_whole("first_row", number, 0, MAX_SEED >> 1)
        drawn = temperature if do_sample else 0.0
        return Sampled(drawn, top_k, top_p, stop_ids(self.spec, stop), seed, first_row)

    def forward(self, input_ids: IdRows, attention_mask: Any = None) -> Tensor:
        """Return the logits of every position: (prompts, prompt_len, vocab) in host memory, 0 at padding.

        input_ids, attention_mask: the prompts, as in `generate`. Raises as `generate` does.
        """
        return self.forward_with(read_request(self.spec, input_ids, attention_mask)).logits

    def forward_with(self, request: Request, last_only: bool = False, hidden_states: bool = False) -> Forward:
        """`forward` for prompts that `read_request` has read, with hidden states if `hidden_states`.

        last_only: whether to compute only the logits of each prompt's last position.
        """
        workload, groups, model, plan = self._prepared_forward(request, last_only, hidden_states)
        result = Forward(self._layers, request, self.dtype, last_only, hidden_states)
        active, pad, reserve = self._machine.device.active(), pad_id(self.spec), plan.workspace(Tier.GPU)
        with active, torch.inference_mode(), (call := Call(model, workload, pad, None, reserve)), call:
            place = self._machine, self._plans.slots.cells
            for numbers, prompts in call.blocks(
                request, groups, lambda prefix, row: closing(result.output(prefix, [row], *place))
            ):
                with closing(result.output(prompts, numbers, *place)) as output:
                    call.run(prompts, 1, output)
                result.spread(numbers, call.prefix)
            self.stats = self._meter.stats(model, call, plan, request, 0)
        return result

    def conversation(self, room: int = 256) -> Conversation:
        """Return a text whose KV cache is kept between calls, so that a call computes only the new tokens.

        room: the minimum size of the cache in tokens. The first call allocates it; a longer text gets a larger one.
        """
        self._opened()
        return Conversation(self, self._opened, self._plans, self._meter, room)

    def check_forward(self, request: Request, last_only: bool = False, hidden_states: bool = False) -> None:
        """Raise the errors that `forward_with` raises before any work."""
        self._prepared_forward(request, last_only, hidden_states)

    def _prepared_forward(
        self, request: Request, last_only: bool, hidden_states: bool
    ) -> tuple[Workload, Sequence[PrefixGroup], Model, MemoryPlan]:
        check_positions(self.spec, request, 0)
        workload = workload_of(self.spec, request, 1)
        topology, cells = self._machine.device.topology, self._plans.slots.cells
        hidden = partial(hidden_needs, self._layers, request, cells, self.dtype, topology)
        every, needs = hidden_states or not last_only, hidden if hidden_states else None
        wanted = Wanted(all_logits=not last_only, whole_prompts=every, extra_needs=needs)
        return workload, *self._prepared(request, workload, wanted)

    def lane_seconds(self, inputs: IdRows, max_new_tokens: int) -> dict[Phase, dict[LaneName, float]]:
        """Return the seconds that each lane, running alone, takes for `generate` on these prompts.

        inputs, max_new_tokens: as in `generate`; rows do not stop early, and no guesses are made.

        The slowest lane of the prefill plus the slowest lane of the decode (`report.bound_seconds`) is a lower bound
        of the run's time, because a block's decode starts after its prefill. Each lane runs its steps of each block,
        for some tokens, while the others are idle. Blocks of equal lengths are timed once. Raises as `generate` does.
        """
        request = read_request(self.spec, inputs)
        workload = workload_of(self.spec, request, max(new_token_counts(self.spec, request, max_new_tokens)))
        groups, model, _ = self._prepared(request, workload, Wanted())
        return lane_seconds(model, request, groups, workload)

    def _prepared(
        self, request: Request, workload: Workload, wanted: Wanted, one_block: bool = False
    ) -> tuple[Sequence[PrefixGroup], Model, MemoryPlan]:
        """The groups of a call's prompts, the model with the call's policy and order, and the plan of `CallPlans`."""
        model, plans = self._opened(), self._plans
        if one_block:
            groups, chosen, plan = plans.of_one_block(request, workload, wanted.extra_needs)
        else:
            groups, chosen, plan = plans.of_groups(request, workload, wanted)
        return groups, replace(model, policy=chosen.policy, order=chosen.order), plan

    def last_report(self, request: Request, max_new_tokens: int, tokens: int) -> Report:
        """The report of the last call, which ran `tokens` of `max_new_tokens` for `request`."""
        assert self.stats is not None
        lengths = request.longest, max_new_tokens, tokens
        return self.stats.report(self.spec.name, self.device, self.placement, *lengths)
