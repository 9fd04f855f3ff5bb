"""The times, tokens and bytes of a call, and their report."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.layout.needs import MemoryPlan
from flexgen.layout.placement import Placement
from flexgen.layout.plan import batch_sizes
from flexgen.memory.cores import thread_counts
from flexgen.memory.cpu import peak_resident_bytes
from flexgen.memory.disk import DISK_THREADS
from flexgen.memory.machine import Machine
from flexgen.policy import Policy, Tier
from flexgen.results.placement import placement_table
from flexgen.results.report import Report
from flexgen.runtime.call import Call, Timing
from flexgen.runtime.debug import projected_decode
from flexgen.runtime.model import Model
from flexgen.runtime.request import Request


@dataclass(frozen=True)
class Stats:
    """Figures of the last call: times and events, its policy, the order of a full block, tokens, and planned and
    measured bytes by tier.

    `prompt_tokens` excludes padding; `positions_computed` includes the padding of the batches. `prefix`: the number
    of tokens that all prompts share and that were computed once. `groups`: the number of groups of prompts, each with
    its own prefix. `reused`: the number of tokens that were computed for another prompt only.
    """

    timing: Timing
    policy: Policy
    order: str
    plan: MemoryPlan
    peak_bytes: dict[Tier, int]
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    positions_computed: int
    prefix: int = 0
    groups: int = 1
    reused: int = 0

    @property
    def padded_share(self) -> float:
        """The share of padding in the positions that the prefill computed, from 0 to 1."""
        return 1 - (self.prompt_tokens - self.reused) / self.positions_computed

    def report(
        self, model: str, device: str, placement: Placement, prompt_len: int, gen_len: int, tokens: int
    ) -> Report:
        """The report of a call that generated tokens, without the lanes' times and the perplexity.

        placement: that of the weights of `model`. prompt_len: the length of the longest prompt. gen_len: the
        requested number of new tokens. The call ran `tokens` of them. If it ran fewer, the decode is projected to
        all tokens, unless every row ended with its first token and there is nothing to decode.
        """
        projected = projected_decode(self.timing, gen_len) if tokens < gen_len else None
        early = projected is None and self.new_tokens < self.num_prompts * gen_len
        return Report(
            model=model,
            policy=self.policy,
            device=device,
            dtype=str(placement.dtype).removeprefix("torch."),
            order=self.order,
            prompt_len=prompt_len,
            gen_len=gen_len,
            num_prompts=self.num_prompts,
            new_tokens=self.new_tokens if early else None,
            prefill_s=self.timing.prefill,
            decode_s=self.timing.decode if projected is None else projected,
            prompt_tokens=self.prompt_tokens,
            prefix=self.prefix,
            prefix_groups=self.groups,
            reused_tokens=self.reused,
            stages=self.timing.places_used,
            guesses_made=self.timing.guesses_made,
            guesses_kept=self.timing.guesses_kept,
            put_back=self.timing.put_back,
            threads=thread_counts(DISK_THREADS),
            padded_share=self.padded_share,
            plan_bytes=self.plan.by_tier,
            peak_bytes=self.peak_bytes,
            placement=placement_table(
                self.policy, placement.percent, batch_sizes(self.policy, self.num_prompts)
            ),
            projected_from=None if projected is None else max(self.timing.ran),
        )


@dataclass(frozen=True)
class Meter:
    """Measures the calls of one model. weights_on_disk: bytes. resident_before: bytes of this process in host memory
    before the weights were loaded."""

    machine: Machine
    weights_on_disk: int
    resident_before: int

    def stats(self, model: Model, call: Call, plan: MemoryPlan, request: Request, new_tokens: int) -> Stats:
        """The figures of a call after it has run `request`."""
        machine, prompts = self.machine, request.prompts
        peak = {
            Tier.GPU: 0 if machine.device.shares_host_memory else machine.device.peak_bytes(),
            Tier.CPU: max(peak_resident_bytes() - self.resident_before, 0),
            Tier.DISK: self.weights_on_disk + machine.disk.peak,
        }
        order = call.order_of(len(batch_sizes(model.policy, len(prompts)))).name
        found = call.counts
        counts = len(prompts), sum(map(len, prompts)), new_tokens, found.positions_computed
        sharing = found.shared, found.groups, found.reused
        return Stats(call.timing, model.policy, order, plan, peak, *counts, *sharing)
