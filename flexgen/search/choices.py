"""The choices of a policy search: block shapes, the device of attention, tiers and codecs for each class of data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from flexgen.errors import HardwareError, PolicyError
from flexgen.models import ModelSpec
from flexgen.models.mlp_spec import MixtureSpec
from flexgen.policy import CODECS as NAMES
from flexgen.policy import STORED, Auto, Policy, Share, Split, Tier
from flexgen.predict.codec_rates import attention_rate, decoding_rate
from flexgen.predict.job import Job
from flexgen.predict.refill import refills
from flexgen.quant import CODECS, head_format
from flexgen.search.linear import CLASSES, Column, Shares
from flexgen.search.moves import Short, refused, traded, with_room

_MOST_BATCHES = 64
"""The maximum number of batches. Beyond it, sharing a load of weights among more batches saves almost nothing."""
_MOST_CELLS = 6_500
"""The maximum number of cells per token, in all layers. With more, predictions are slow and runs have short steps."""
_GUESSES = (4, 8)
"""The numbers of guesses to try. More are rarely right, and fewer save little of a pass that loads weights."""
_RESERVED = (1, 2)
"""The numbers of tokens to reserve for each row, in mean numbers of new tokens. All rows of a batch have memory up to
the longest of them, which is longer than the mean."""
_RATES = (0.75, 1.25, 1.5)
"""Numbers of prompts that enter in a pass, as multiples of those that end in one. Fewer leave places empty, but more
fill them earlier."""
_ONE_BATCH = (32, 64, 128)
"""Numbers of rows to try for one batch whose rows close up. The search also tries the places of the best block."""
_FEWEST_BLOCKS = 2
"""The number of blocks of prompts from which prompts may enter at a rate. Half of the places are empty while they are
filled and again in the end, for as many passes as answers have tokens."""


def with_guesses(policy: Policy, spec: ModelSpec) -> Iterator[Policy]:
    """`policy` with each number of guesses that a search tries, if it may have any."""
    if policy.attn_sparsity < 1 or policy.cache.percent(Tier.DISK) or policy.reserve_new:
        return
    for guess in _GUESSES:
        if policy.gpu_batch_size * (1 + guess) <= spec.chunk_tokens:
            yield policy.replace(guess=guess, prefill_rows=0)


class Choices:
    """All policies with the given fields. `fixed`: the names of the given fields.

    every: of the batch sizes and numbers of batches, only each n-th one is a choice.
    """

    def __init__(self, job: Job, auto: Auto, every: int = 1) -> None:
        self._job = job
        # `Policy` refuses prompts that enter at a rate with other activations.
        fixed = {"activations": {"gpu": 100}, **auto.fixed} if auto.fixed.get("prefill_rows") else auto.fixed
        self._settled = Policy.from_dict(fixed)
        self._lossy = auto.lossy
        self._every = every
        self._shared = job.hardware.topology.shares_host_memory
        self.fixed = frozenset(fixed)
        # If the compute device is the host, its memory is the one tier CPU.
        self.tiers = (Tier.CPU, Tier.DISK) if self._shared else (Tier.CPU, Tier.GPU, Tier.DISK)

    def forms(self) -> Iterator[Policy]:
        """Policies with every choice except shape and placement; free classes of data are on the host."""
        free = {what: {Tier.CPU: 100} for what in CLASSES if what not in self.fixed}
        form = self._settled.replace(**free)
        attending = ("gpu",) if self._shared or self._on_device else ("gpu", "cpu")
        for attend_on in attending if "attend_on" not in self.fixed else (form.attend_on,):
            # With whole layers (`sep_layer = false`), the host computes attention of one batch while the device
            # computes another batch of the same layer.
            apart = (True, False) if attend_on == "cpu" and not self._shared else (True,)
            for sep_layer in apart if "sep_layer" not in self.fixed else (form.sep_layer,):
                one = form.replace(attend_on=attend_on, sep_layer=sep_layer)
                yield one
            # A host that is the compute device is busy all the time. There, only `closing_up` helps.
            if not self._shared and self._may_enter(one):  # if the host attends, only with whole layers
                # The number depends on the shape.
                yield one.replace(prefill_rows=1, activations={Tier.GPU: 100})

    def _may_enter(self, form: Policy) -> bool:
        """Whether prompts may enter in the places of single rows."""
        chosen = "prefill_rows" not in self.fixed and form.attn_sparsity == 1
        on_disk = "cache" in self.fixed and form.cache.percent(Tier.DISK)
        elsewhere = "activations" in self.fixed and form.activations.percent(Tier.GPU) < 100
        stretches = self._job.spec.stretches(self._job.workload.capacity)
        others = form.guess or form.reserve_new or form.prefill_chunk
        return chosen and not (others or on_disk or elsewhere or stretches)

    def shaped(self, form: Policy, size: int, batches: int) -> Policy | None:
        """`form` with this shape. If prompts enter at a rate, they enter as fast as others end.

        It is None if prompts cannot enter at a rate in this shape, or if places would be empty most of the time.
        """
        shaped = form.replace(gpu_batch_size=size, num_gpu_batches=batches)
        if not form.prefill_rows or "prefill_rows" in self.fixed:
            return shaped
        workload = self._job.workload
        too_large = size > self._job.spec.chunk_tokens  # see `plan_memory`
        if too_large or workload.num_prompts < _FEWEST_BLOCKS * shaped.block_size:
            return None
        mean = workload.mean_new or workload.gen_len
        return shaped.replace(prefill_rows=max(round(shaped.block_size / mean), 1))

    def places(self, form: Policy) -> Iterator[Policy]:
        """`form` with one prompt fewer to two more that enter in each pass, and the number of places for this rate.

        So on average, a whole number of rows ends in each pass, and a prompt enters in each of their places.
        """
        if not form.prefill_rows or self.fixed & {"prefill_rows", "gpu_batch_size"}:
            return
        mean, batches = self._job.workload.mean_new or self._job.workload.gen_len, form.num_gpu_batches
        for entering in range(max(form.prefill_rows - 1, 1), form.prefill_rows + 3):
            shaped = self.shaped(form, math.ceil(entering * mean / batches), batches)
            if shaped and shaped != form:
                yield shaped

    def variants(self, policy: Policy, short: Short) -> Iterator[Policy]:
        """Variants of `policy`: other rates at which prompts enter, one batch whose rows close up, more of the cache
        on the GPU in place of weights, and guesses."""
        yield from self.rates(policy)
        yield from self.closing_up(policy)
        if policy.prefill_rows and not self.fixed & {"weights", "cache"}:
            yield from traded(policy, self.tiers, short)
        for guessing in self.guessing(policy):
            room = guessing if "weights" in self.fixed else with_room(guessing, self.tiers, short)
            if room is not None:
                yield room

    def rates(self, policy: Policy) -> Iterator[Policy]:
        """`policy` with other numbers of prompts that enter in a pass, at most as many as it has places."""
        now = policy.prefill_rows
        if not now or "prefill_rows" in self.fixed:
            return
        rates = (min(max(round(times * now), 1), policy.block_size) for times in _RATES)
        yield from (policy.replace(prefill_rows=rate) for rate in dict.fromkeys(rates) if rate != now)

    def closing_up(self, policy: Policy) -> Iterator[Policy]:
        """`policy` with one batch whose rows close up. A prompt enters in it as soon as a row has ended."""
        workload, topology = self._job.workload, self._job.hardware.topology
        shape_given = bool(self.fixed & {"gpu_batch_size", "num_gpu_batches"})
        on_disk = policy.cache.percent(Tier.DISK) > 0
        if shape_given or on_disk or workload.mean_new is None or not self._may_enter(policy):
            return
        most = min(workload.num_prompts, self._job.spec.chunk_tokens)
        for rows in sorted({policy.block_size, *_ONE_BATCH}):
            shape = dict(gpu_batch_size=rows, num_gpu_batches=1, prefill_rows=rows)
            one = policy.replace(activations={Tier.GPU: 100}, **shape)
            if rows <= most and topology.closes_up(one):
                yield one

    def guessing(self, policy: Policy) -> Iterator[Policy]:
        """`policy` with numbers of guesses, if the workload says how many of them are right."""
        if self._job.workload.copied > 1 and "guess" not in self.fixed:
            yield from with_guesses(policy, self._job.spec)

    @cached_property
    def joins_layers(self) -> bool:
        """Whether whole layers (`sep_layer = false`) may overlap much better than attention and MLPs apart.

        The experts are almost all of a mixture's layer. Apart from attention, they are every second unit, so two
        slots that the units use in turn serve all of them with one slot, and no load overlaps with their arithmetic.
        """
        mixture = any(isinstance(layer.mlp, MixtureSpec) for layer in self._job.spec.layers)
        return mixture and "sep_layer" not in self.fixed

    @property
    def _on_device(self) -> bool:
        """Whether the given fields put the whole cache in GPU memory."""
        return "cache" in self.fixed and self._settled.cache.percent(Tier.GPU) == 100

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        columns = []
        for what in CLASSES:
            if what in self.fixed:
                split: Split = getattr(self._settled, what)
                columns += [Column(what, tier, split[tier].codec) for tier in Tier if split.percent(tier)]
                continue
            for tier in self.tiers:
                if refused(self._settled, what, tier):
                    continue
                columns += [Column(what, tier, codec) for codec in (*NAMES, STORED) if self._may(what, codec)]
        return tuple(columns)

    def columns_of(self, form: Policy) -> tuple[Column, ...]:
        """The columns for policies of this form."""
        return tuple(column for column in self.columns if not refused(form, column.what, column.tier))

    def _may(self, what: str, codec: str) -> bool:
        """Whether a codec may be chosen for a class of data and the machine has its rates."""
        if codec == "none":
            return True
        if codec == STORED:  # lossless
            return what == "weights" and bool(self._job.spec.encoded)
        if not self._lossy or what == "activations" or not CODECS[codec].searched:
            return False
        if what == "cache" and self._settled.attn_sparsity < 1:
            return False
        try:
            if what == "weights":
                decoding_rate(self._job.hardware, self._job.dtype, CODECS[codec])
            else:
                self._check_attention(codec)
        except (HardwareError, PolicyError):  # no figures, or an unsupported head size
            return False
        return True

    def _check_attention(self, codec: str) -> None:
        """Raise HardwareError or PolicyError unless all rates of attention over `codec` are known."""
        for head_dim in {layer.attention.head_dim for layer in self._job.spec.layers}:
            heads = head_format(codec, head_dim, self._job.dtype)
            for on_device in (True,) if self._shared else (True, False):
                attention_rate(self._job.hardware, self._job.dtype, codec, heads, on_device)

    @cached_property
    def given(self) -> Shares:
        """The shares that the given fields set."""
        given = {}
        for column in self.columns:
            if column.what in self.fixed:
                split: Split = getattr(self._settled, column.what)
                given[column] = split.percent(column.tier) / 100
        return given

    def shapes(self, form: Policy) -> dict[int, list[int]]:
        """Numbers of batches by batch size, in ascending order.

        No block is larger than the job. If blocks run one after another, those of a job are about equally full.
        """
        prompts, settled = self._job.workload.group_sizes[0], self._settled
        size_fixed, batches_fixed = ("gpu_batch_size" in self.fixed, "num_gpu_batches" in self.fixed)
        most = max(_MOST_CELLS // (2 * self._job.spec.num_layers + 2), 1)
        largest = prompts if not settled.guess else self._job.spec.chunk_tokens // (1 + settled.guess)
        sizes = [settled.gpu_batch_size] if size_fixed else self._ladder(max(min(prompts, largest), 1))
        numbers = (
            [settled.num_gpu_batches] if batches_fixed else self._ladder(min(prompts, _MOST_BATCHES, most))
        )
        shapes: set[tuple[int, int]] = set()
        for size in sizes:
            for batches in numbers:
                if refills(self._job.workload, form) and size * batches < prompts:
                    shapes.add((size, batches))
                    continue
                blocks = -(-prompts // (size * batches))
                each = -(-prompts // blocks)
                even = size if size_fixed else -(-each // batches)
                shapes.add((even, batches if batches_fixed else -(-each // even)))
        by_size: dict[int, list[int]] = {}
        for size, batches in sorted(shapes):
            by_size.setdefault(size, []).append(batches)
        return by_size

    def _ladder(self, most: int) -> list[int]:
        """1, 2, 3, 4, 6, 8, 12, ... up to `most`, and `most`. Of those between, only each `every`-th one."""
        steps = {most}
        power = 1
        while power <= most:
            steps |= {power, *([power // 2 * 3] if power > 1 else [])}
            power *= 2
        ladder = sorted(step for step in steps if step <= most)
        return sorted({1, *ladder[:: -self._every]})

    def rounded(self, form: Policy, shares: Shares) -> Policy:
        """`form` with `shares` as whole percentages; those of cache and activations match whole rows of a batch."""
        splits = {}
        for what in CLASSES:
            if what in self.fixed:
                continue
            own = {column: share for column, share in shares.items() if column.what == what}
            percents = np.array([own[column] for column in own])
            if what != "weights":
                percents = _whole(percents, form.gpu_batch_size) / form.gpu_batch_size
            percents = _whole(percents, 100)
            splits[what] = {c.tier: Share(int(p), c.codec) for c, p in zip(own, percents, strict=True) if p}
        return form.replace(**splits)


def reserves(job: Job, auto: Auto) -> Iterator[int]:
    """The values of `Policy.reserve_new` to try besides 0, if the workload says how long answers are on average.

    With fewer tokens, many rows are put back. With more, most of the memory is reserved in vain.
    """
    workload, settled = job.workload, Policy.from_dict(auto.fixed)
    others = settled.guess or settled.prefill_rows or settled.attn_sparsity < 1
    unlike = others or job.spec.stretches(workload.capacity)
    if workload.mean_new is None or unlike or "reserve_new" in auto.fixed:
        return
    wanted = (math.ceil(times * workload.mean_new) for times in _RESERVED)
    yield from (tokens for tokens in wanted if tokens < workload.gen_len)


def _whole(parts: np.ndarray, total: int) -> np.ndarray:
    """`parts`, scaled to the sum `total` and rounded to whole numbers; the largest remainders are rounded up."""
    exact = parts / parts.sum() * total
    whole = np.floor(exact + 1e-6)
    for n in np.argsort(whole - exact)[: round(total - whole.sum())]:
        whole[n] += 1
    return whole
