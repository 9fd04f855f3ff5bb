"""`OptLM`: a model opened on a machine under a policy, and its calls."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flexgen.engine.completion import Completion
from flexgen.engine.conveniences import Conveniences
from flexgen.engine.conversation import Conversation
from flexgen.engine.opening import Place, open_weights, read_policy
from flexgen.errors import RequestError
from flexgen.layout.limits import read_limits
from flexgen.layout.needs import Kept, MemoryPlan, Need
from flexgen.layout.placement import Placement
from flexgen.memory.device import ComputeDevice
from flexgen.memory.machine import Machine
from flexgen.models import HubOptions, Layer, open_model
from flexgen.policy import Auto, Policy, Tier
from flexgen.results.report import Report
from flexgen.results.trace import LaneName, Phase
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Choice, Listener, Sampled
from flexgen.runtime.debug import order_to_run, summary, tokens_to_run
from flexgen.runtime.draws import MAX_SEED
from flexgen.runtime.lane_timing import lane_seconds
from flexgen.runtime.model import Model
from flexgen.runtime.positions import Forward, hidden_needs
from flexgen.runtime.request import (
    IdRows,
    Request,
    check_bool,
    check_length,
    check_positions,
    check_whole,
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

    model: "demo", a directory in Hugging Face's layout, a hub id, a known OPT name ("opt-30b") or a transformers
        config; weights="dummy" makes random weights of the right shapes and never touches the network, and a
        `Path` as `weights` is a directory that holds them in place of the model's own.
    policy: a `Policy`, the path of its TOML file, or "auto" (`Auto(...)` with fields that are given): found by a
        search for this machine, which is measured once, and `workload`. A call that is unlike it may get another
        one, with the weights where they are.
    workload: for which "auto" searches; `engine.auto.USUAL` if None.
    device: "auto", "cpu", "cuda", "cuda:0", "emulated" or "emulated:memory=1GiB,link=8GiB,disk=2GiB".
    dtype: of arithmetic, weights and cache: "auto" (the checkpoint's own), "float32", "bfloat16", "float16".
    offload_dir: where cache and hidden states on disk, and weights that are in no file as they are needed, are
        kept; a temporary directory if None. Weights already written there are used again.
    progress: bars for loading and generation; None shows them on a terminal only.
    order: the name of a schedule, instead of the one that the policy asks for.
    num_layers: only the first layers of the model, for trials; what it generates means nothing then.
    max_memory: bytes that the model and its calls may take of a tier, at most; what is not named is not limited.
    hub: how a model that is not on this machine is downloaded: revision, token, cache, local files only.

    Opening places all weights. It is a context manager: leaving it frees files, threads and pinned memory.
    Raises PolicyError, ModelError, CheckpointError, ScheduleError (an order that is unknown or not legal),
    RequestError (an unknown device or dtype, a wrong max_memory) and CapacityError (what does not fit, before a
    byte moves).
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
        place = Place(device, dtype, offload_dir, read_limits(max_memory), progress)
        self._no_bar = None if progress is None else not progress
        opened = open_weights(self.spec, checkpoint, policy, place, workload, order)
        # Also when the user forgets to close, and at exit: files and threads must not stay behind.
        self._finalizer = opened.closed_with(self)
        self.policy, self.auto = opened.model.policy, opened.plans.auto
        self._plans = opened.plans
        self._meter = Meter(self._machine, self.placement.nbytes[Tier.DISK], opened.resident_before)
        self._model: Model | None = opened.model

    @property
    def dtype(self) -> torch.dtype:
        """Of arithmetic, weights and cache."""
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
        """Name of the compute device."""
        return self._machine.device.name

    @property
    def layer_names(self) -> list[str]:
        """Names of the streaming units, indexed like `Step.layer` in traces."""
        return [layer.name for layer in self._layers]

    def memory_in_use(self) -> dict[Tier, int]:
        """Bytes by tier: weights, and while a call runs its buffers and files. Weights on disk are not counted."""
        return self._machine.in_use()

    def close(self) -> None:
        """Free files, threads and memory; the model cannot be used afterwards. Streams that still run are ended, and
        so is a call in another thread, by RequestError; from within a call it raises one itself. In a process that
        was forked after the model was opened it does nothing: all of it belongs to the parent."""
        if self._plans.in_use.inherited:
            return
        self._plans.in_use.refuse_inside()
        self._end_streams()
        try:
            self._finalizer()
        finally:  # Ctrl-C too comes out behind it
            self._model = None  # and with it the last references to weights and slots:
            self._machine.device.close()  # a GPU's memory can be given back only now

    def _opened(self) -> Model:
        self._plans.in_use.refuse_closed()
        assert self._model is not None
        return self._model

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Pickling and copying raise RequestError: threads, open files and memory go into no pickle."""
        raise RequestError(
            "an OptLM can be neither pickled nor copied, it holds threads, open files and memory: pass the arguments "
            "(the model's name and the Policy, which pickles) and call OptLM(...) in the worker"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Their other arguments are those of the method itself.
    @overload
    def generate(self, *args: Any, stats: Literal[False] = False, **options: Any) -> np.ndarray: ...

    @overload
    def generate(self, *args: Any, stats: Literal[True], **options: Any) -> tuple[np.ndarray, Report]: ...

    def generate(  # type: ignore[misc]
        self,
        inputs: IdRows,
        max_new_tokens: int = 32,
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
        """Prompts and what follows them, (prompts, prompt_len + max_new_tokens) int64.

        inputs: ids as an array or tensor (prompts, prompt_len), or a list of id lists of any lengths. Shorter
            prompts are padded on the left, in the result too; there may be any number of them.
        do_sample: draw with `temperature`, `top_k` and `top_p` (see `sample`), from `seed`, or a random one if it is
            None; otherwise take the most probable token.
        first_row: number of the first prompt in a job that several calls share, or of each prompt. A draw depends on
            the seed, the prompt's number in the job and the token alone, so that the job gets the same samples
            however it is split into calls, and under every policy, order and device, but for what rounding of
            logits decides.
        stop: the id or ids that end a row, the model's end ids if None; `()` never stops. What follows a stop
            is the pad id.
        attention_mask: (prompts, prompt_len), 0 for padding at either end of a row. Without it, pad ids that
            begin a row of a rectangular input are padding.
        cut_gen_len: generate only this many tokens, the rest of the result is pad ids (for benchmarks). A report
            (`stats`) projects from them and takes at least 2.
        debug_mode: both run a few tokens only, as `cut_gen_len` does, and print the times projected from them.
            "breakdown" also prints what each operation took, with nothing else running (order "normal").
        verbose: above 0, prints a summary of the call (to stderr).
        stats: also return the call's `Report`: what it took, and what was stored where.

        Raises RequestError for what cannot be served and CapacityError for what does not fit, before any work;
        LaneError, with its cause, if a step fails.
        """
        request = read_request(self.spec, inputs, attention_mask)
        check_length(self.spec, request, max_new_tokens)
        choice = self.sampled(
            do_sample, temperature, stop, top_k=top_k, top_p=top_p, seed=seed, first_row=first_row
        )
        tokens = tokens_to_run(max_new_tokens, cut_gen_len, debug_mode, projected=stats)
        check_whole("verbose", int(verbose) if isinstance(verbose, bool) else verbose, 0)
        order = order_to_run(debug_mode)
        out = self.generate_with(Completion(request, max_new_tokens, choice, tokens), order=order)
        if (debug_mode or verbose) and (done := self.stats):
            ran = done.timing, len(out), done.new_tokens, tokens, max_new_tokens, debug_mode
            print(summary(*ran), file=sys.stderr)
        return (out, self.last_report(request, max_new_tokens, tokens)) if stats else out

    def generate_with(
        self,
        completion: Completion,
        *,
        listeners: Sequence[Listener] = (),
        kept: Sequence[Need] = (),
        check: Callable[[], object] | None = None,
        order: str | None = None,
    ) -> np.ndarray:
        """`generate` for any choice of the next id.

        listeners: called with the new ids as they come. kept: what the caller keeps of the call, in addition to what
            the plan counts. check: called before each step; what it raises ends the call and comes out as it is. Such
            a call shows no bar. order: replaces the policy's own; it must do with the slots of the model.

        What the choice and the listeners raise comes as the cause of a LaneError. A choice that sees the `whole_call`
        runs all prompts in one block, and what does not fit so is a CapacityError. Raises as `generate` does.
        """
        completion.check(self.spec)
        request, choice, tokens = completion.request, completion.choice, completion.run
        pad = completion.pad_id(self.spec)
        workload = Workload(request.longest, completion.max_new_tokens, len(request.prompts))
        if whole := choice.whole_call:
            topology = self._machine.device.topology
            logits = whole_call_needs(workload.num_prompts, self.spec.vocab_size, self.dtype, topology)
            kept = [*kept, *logits]
        model, plan = self._prepared(workload, kept=lambda policy: kept, one_block=whole)
        model = model if order is None else replace(model, order=order)
        out = completion.blank(pad)
        new_tokens = 0
        no_bar = self._no_bar if check is None else True
        bar = tqdm(total=len(out) * tokens, desc="tokens", unit="token", disable=no_bar, leave=False)
        all_listeners = [lambda new: bar.update(len(new.rows)), *listeners]
        active, reserve = self._machine.device.active(), plan.workspace(Tier.GPU)
        with bar, active, torch.inference_mode(), (call := Call(model, workload, pad, check, reserve)), call:
            for rows in request.blocks(model.policy.block_size):
                prompts = call.prepare([request.prompts[n] for n in rows])
                made = WholeCallTokens if whole else NewTokens
                output = made(prompts, tokens, choice, rows, all_listeners)
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
        """The choice of the next id that `generate` makes with these arguments. Raises RequestError."""
        self._opened()
        check_bool("do_sample", do_sample)
        check_sampling(temperature, top_k, top_p)
        check_seed(seed)
        for number in first_row if isinstance(first_row, Sequence) else [first_row]:
            check_whole("first_row", number, 0, MAX_SEED >> 1)
        drawn = temperature if do_sample else 0.0
        return Sampled(drawn, top_k, top_p, stop_ids(self.spec, stop), seed, first_row)

    def forward(self, input_ids: IdRows, attention_mask: Any = None) -> Tensor:
        """Logits (prompts, prompt_len, vocab) of every position, in host memory; zero in the padding.

        Prompts as in `generate`, of any number and, as lists, of any lengths; each row's logits stand where
        its ids stood. Raises as `generate` does.
        """
        return self.forward_with(read_request(self.spec, input_ids, attention_mask)).logits

    def forward_with(self, request: Request, last_only: bool = False, hidden_states: bool = False) -> Forward:
        """`forward` for prompts that `read_request` has read, with the hidden states on request.

        last_only: logits of each prompt's last position alone.
        """
        workload, model, plan = self._prepared_forward(request, last_only, hidden_states)
        result = Forward(self._layers, request, self.dtype, last_only, hidden_states)
        active, pad, reserve = self._machine.device.active(), pad_id(self.spec), plan.workspace(Tier.GPU)
        with active, torch.inference_mode(), (call := Call(model, workload, pad, None, reserve)), call:
            for numbers in request.blocks(model.policy.block_size):
                prompts = call.prepare([request.prompts[n] for n in numbers])
                with contextlib.closing(
                    result.output(prompts, numbers, self._machine, self._plans.slots.cells)
                ) as output:
                    call.run(prompts, 1, output)
            self.stats = self._meter.stats(model, call, plan, request, 0)
        return result

    def conversation(self, room: int = 256) -> Conversation:
        """A text whose KV cache is kept from call to call, so that each computes only what is new.

        room: tokens that its cache has room for, at least. It is taken by the first call, and grows where a text
        outgrows it.
        """
        self._opened()
        return Conversation(self, self._opened, self._plans, self._meter, room)

    def check_forward(self, request: Request, last_only: bool = False, hidden_states: bool = False) -> None:
        """Raise what `forward_with` raises before any work."""
        self._prepared_forward(request, last_only, hidden_states)

    def _prepared_forward(
        self, request: Request, last_only: bool, hidden_states: bool
    ) -> tuple[Workload, Model, MemoryPlan]:
        check_positions(self.spec, request, 0)
        workload = Workload(request.longest, 1, len(request.prompts))
        topology, cells = self._machine.device.topology, self._plans.slots.cells
        hidden = partial(hidden_needs, self._layers, request, cells, self.dtype, topology)
        every = hidden_states or not last_only
        return workload, *self._prepared(
            workload, not last_only, hidden if hidden_states else None, whole_prompts=every
        )

    def lane_seconds(self, inputs: IdRows, max_new_tokens: int) -> dict[Phase, dict[LaneName, float]]:
        """Seconds that each lane alone would take for `generate` on these prompts, without stopping early.

        The largest of each phase, summed (`report.bound_seconds`), is the bound that orders are held against: a
        block's decode cannot begin before its prefill is done. Each lane runs its part of each block with the
        others idle (some tokens of it, see `Call.time_lane`); a block of lengths that were timed is not run again.
        """
        request = read_request(self.spec, inputs)
        check_length(self.spec, request, max_new_tokens)
        workload = Workload(request.longest, max_new_tokens, len(request.prompts))
        model, _ = self._prepared(workload)
        return lane_seconds(model, request, workload)

    def _prepared(
        self,
        workload: Workload,
        all_logits: bool = False,
        kept: Kept | None = None,
        one_block: bool = False,
        whole_prompts: bool = False,
    ) -> tuple[Model, MemoryPlan]:
        """The model under the policy and in the order of a call, and the plan. Raises as `CallPlans.of_call` does."""
        model, plans = self._opened(), self._plans
        if one_block:
            chosen, plan = plans.of_one_block(workload, kept)
        else:
            chosen, plan = plans.of_call(workload, all_logits, kept, whole_prompts)
        return replace(model, policy=chosen.policy, order=chosen.order), plan

    def last_report(self, request: Request, max_new_tokens: int, tokens: int) -> Report:
        """Of the last call, which ran `tokens` of `max_new_tokens` for `request`."""
        assert self.stats is not None
        lengths = request.longest, max_new_tokens, tokens
        return self.stats.report(self.spec.name, self.device, self.placement, *lengths)
