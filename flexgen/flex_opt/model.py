"""`OptLM` with the arguments and conventions of FlexGen 0.1, on top of this engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen.engine import model as engine
from flexgen.flex_opt.config import OptConfig
from flexgen.flex_opt.environment import ExecutionEnv
from flexgen.flex_opt.places import find_weights, read_config
from flexgen.flex_opt.policy import Policy
from flexgen.flex_opt.timer import GENERATE, costs_of, timers
from flexgen.results.trace import Event, Phase
from flexgen.runtime.debug import BREAKDOWN
from flexgen.runtime.draws import seed_from_torch
from flexgen.runtime.request import IdRows, leading, read_rows
from flexgen.runtime.stats import Stats
from flexgen.schedule.steps import Op


@dataclass(frozen=True)
class Task:
    """The arguments of a call of `generate`."""

    inputs: Any
    prompt_len: int
    gen_len: int
    cut_gen_len: int | None
    do_sample: bool
    temperature: float
    stop: int | None


class OptLM:
    """An OPT model on the devices of `env`, with its weights under `path` (see `find_weights`).

    config: an `OptConfig`, a name that `get_opt_config` accepts, or the name of a directory in Hugging Face's layout
        under `path`.

    `close_copy_threads` of `env` closes the model. The attribute `engine` is the `flexgen.OptLM` that does the work;
    its exceptions are raised unchanged.
    """

    def __init__(self, config: str | OptConfig, env: ExecutionEnv, path: str, policy: Policy) -> None:
        self.config = read_config(config, str(path))
        self.env = env
        self.path = path
        self.policy = policy
        self.num_gpu_batches = policy.num_gpu_batches
        self.task: Task | None = None
        found = find_weights(self.config, str(path))
        self.engine = engine.OptLM(
            found.model,
            policy.to_policy(),
            device="auto" if env.gpu is None else env.gpu.device,
            offload_dir=None if env.disk is None else env.disk.path,
            weights=found.weights,
        )
        env.adopt(self.engine)
        self.num_layers = len(self.engine.layer_names)

    @property
    def stats(self) -> Stats | None:
        """The statistics of the last call."""
        return self.engine.stats

    def generate(
        self,
        inputs: IdRows,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: int | None = None,
        debug_mode: str | None = None,
        cut_gen_len: int | None = None,
        verbose: int = 0,
    ) -> np.ndarray:
        """The prompts with their continuations, (prompts, prompt_len + max_new_tokens) int32.

        inputs: any number of prompts, in the forms that `flexgen.OptLM.generate` accepts. Pad ids at the beginning
            of a row are not computed. Rows of pad ids alone, with which scripts fill up a block, are not computed
            either; their continuation is pad ids.
        do_sample: sample with a seed from torch's global generator, so `torch.manual_seed` makes it repeatable.
        stop: the id that ends a row. As in 0.1, None, 0 and texts end no row (one of its scripts passes a text).
        debug_mode: "fewer_batch" and "breakdown" run a few tokens and extrapolate the times; "breakdown" also prints
            0.1's table of costs.

        Appends to `timers("generate").costs` the seconds of the prefill, then the mean decode time for each later
        token.

        Raises the exceptions of `flexgen.OptLM.generate`.
        """
        rows, _ = read_rows(inputs)
        prompt_len, pad_id = max(map(len, rows)), self.config.pad_token_id
        cut_gen_len = cut_gen_len or None
        self.task = Task(inputs, prompt_len, max_new_tokens, cut_gen_len, do_sample, temperature, stop)
        prompts = [row[leading(row, pad_id) :] for row in rows]
        # An empty row is a mistake, not padding: the engine rejects it.
        nonempty = [n for n, row in enumerate(rows) if len(prompts[n]) or not len(row)]
        if not nonempty:
            return np.full((len(rows), prompt_len + max_new_tokens), pad_id, np.int32)
        made = self.engine.generate(
            [prompts[n] for n in nonempty],
            max_new_tokens,
            do_sample,
            temperature,
            stop=() if isinstance(stop, str) or not stop else stop,
            debug_mode=debug_mode,
            cut_gen_len=cut_gen_len,
            verbose=verbose,
            seed=seed_from_torch() if do_sample else None,
            first_row=nonempty,
        )
        assert self.stats is not None
        timing = self.stats.timing
        # Like 0.1, fill the timer with the extrapolated times of a debug mode.
        timers(GENERATE).costs += costs_of(timing, (cut_gen_len or max_new_tokens) if debug_mode else None)
        if debug_mode == BREAKDOWN:
            batches = -(-len(nonempty) // self.policy.gpu_batch_size)
            blocks = -(-batches // self.num_gpu_batches)
            table = cost_lines(timing.trace.events, self.num_layers, batches, blocks, max_new_tokens)
            print("\n".join(table))
        out = np.full((len(rows), prompt_len + max_new_tokens), pad_id, np.int32)
        for row, ids in zip(out, rows, strict=True):
            row[prompt_len - len(ids) : prompt_len] = ids
        out[nonempty, prompt_len:] = made[:, -max_new_tokens:]
        return out


def cost_lines(events: Sequence[Event], layers: int, batches: int, blocks: int, gen_len: int) -> list[str]:
    """0.1's table of costs: mean seconds to load a layer, and of each operation for a layer and a batch.

    events: the events of a run without overlap. batches: the batches of all blocks. gen_len: the requested number of
    new tokens.
    """
    seconds: dict[tuple[Op, Phase], float] = {}
    decoded = max((event.step.token for event in events), default=0)
    for event in events:
        key = event.step.op, Phase.DECODE if event.step.token > 0 else Phase.PREFILL
        seconds[key] = seconds.get(key, 0.0) + event.end - event.start
    weights = sum(seconds.get((Op.LOAD_WEIGHTS, phase), 0.0) for phase in Phase)
    lines = [
        f"#layers: {layers}",
        f"#batches prefill:  {layers * batches}",
        f"#batches decoding: {(gen_len - 1) * layers * batches}",
        f"load_weight            (per-layer): {weights / (layers * blocks * (decoded + 1)):.6f} s",
    ]
    names = {"load_cache": Op.LOAD_CACHE, "store_cache": Op.STORE_CACHE, "compute_layer": Op.COMPUTE}
    for stage, phase, tokens in (("prefill", Phase.PREFILL, 1), ("decoding", Phase.DECODE, decoded)):
        for name, op in names.items():
            if tokens:
                mean = seconds.get((op, phase), 0.0) / (layers * batches * tokens)
                lines.append(f"{f'{name}_{stage}':22s} (per-batch): {mean:.6f} s")
    return lines
