"""Rows as they end, text, scores and reports: the results of `generate` and `forward` in other forms."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen.demo import MODEL_DIR
from flexgen.engine.model import OptLM
from flexgen.engine.scoring import log_likelihoods
from flexgen.errors import LaneError, ModelError, RequestError
from flexgen.models.embed import Head
from flexgen.policy import Policy
from flexgen.runtime.stream import Stream

PATIENCE = 60.0
LENGTHS, TOKENS, PAD = [3, 7, 5, 9, 2, 6, 4, 8], 12, 1
TEXTS = ["Length: 42.7 km\nUnit: m\nAnswer:", "Date: 26 Apr 2019", "Weight: 78.0 t\nUnit:"]


class Gate:
    """Holds the computation of the head at call number `at` until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.calls, self.at = 0, at
        self.reached, self._opened = threading.Event(), threading.Event()
        forward = Head.forward

        def gated(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                self.reached.set()
                self._opened.wait(60)
            return forward(*args, **options)

        patch.setattr(Head, "forward", gated)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture(params=["cpu", "emulated"])
def lm(request: Any, tiny: Any, mixed: Any) -> Iterator[OptLM]:
    with OptLM(tiny("opt").directory, mixed(), device=request.param, progress=False) as model:
        yield model


def stops_of(rows: np.ndarray) -> list[int]:
    """Ids at which some rows end early."""
    return sorted({int(rows[0, 2]), int(rows[3, 5])})


def up_to_stop(row: np.ndarray, stops: list[int]) -> list[int]:
    found = np.flatnonzero(np.isin(row, stops))
    return row[: found[0] + 1 if len(found) else len(row)].tolist()


# Rows as they end


def test_rows_come_as_they_end(lm: OptLM, prompts: Any) -> None:
    given = prompts(LENGTHS)
    every = lm.generate(given, TOKENS, stop=())[:, max(LENGTHS) :]
    stops = stops_of(every)
    found = list(lm.stream(given, TOKENS, stop=stops))
    assert sorted(row for row, _ in found) == list(range(len(given)))
    for row, ids in found:
        assert ids.dtype == np.int64 and ids.tolist() == up_to_stop(every[row], stops)
    counts = [len(ids) for _, ids in found]
    assert len(set(counts)) > 1, "nothing ended early"
    for block in (counts[: lm.policy.block_size], counts[lm.policy.block_size :]):
        assert block == sorted(block)
    assert lm.stats is not None and lm.stats.new_tokens == sum(counts)


def test_drawn_rows_are_those_of_generate(lm: OptLM, prompts: Any) -> None:
    sampling = dict(do_sample=True, temperature=0.8, top_k=20, seed=3)
    expected = lm.generate(prompts([4, 6]), 6, stop=(), **sampling)[:, 6:]
    found = dict(lm.stream(prompts([4, 6]), 6, stop=(), **sampling))
    np.testing.assert_array_equal([found[0], found[1]], expected)


def test_a_stream_that_is_left_leaves_a_model_that_works(
    lm: OptLM, prompts: Any, threads: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prompts(LENGTHS)
    expected = lm.generate(given, TOKENS, stop=())
    (first,) = {int(id) for id in expected[:1, max(LENGTHS)]}
    before, used = threads(), lm.memory_in_use()
    gate = Gate(monkeypatch, at=7)  # the first block has two batches: it stands still at the fourth token
    stream = lm.stream(given, TOKENS, stop=first)
    assert gate.reached.wait(60)
    with pytest.raises(RequestError, match="still running.*close the stream"):
        lm.generate(given, 2)
    stream._writer.abandoned = True  # what close does first; then it waits
    gate.open()
    stream.close()
    assert list(stream) == []
    assert gate.calls < 2 * TOKENS, "the run went on"
    assert threads() == before
    assert lm.memory_in_use() == used
    np.testing.assert_array_equal(lm.generate(given, TOKENS, stop=()), expected)


def test_closing_the_model_ends_its_streams(lm: OptLM, prompts: Any, threads: Callable[[], set[str]]) -> None:
    stream = lm.stream(prompts(LENGTHS), 30, stop=())
    lm.close()
    assert list(stream) == []
    assert "flexgen-stream" not in threads()
    with pytest.raises(RequestError, match="closed"):
        lm.stream(prompts([3]))


def test_an_error_shows_where_the_next_row_would_come(
    lm: OptLM, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError("the cable is out")
    with monkeypatch.context() as patch:
        gate = Gate(patch, at=10_000)
        whole = len(list(lm.stream(prompts(LENGTHS), 4, stop=())))
        forward, last = Head.forward, gate.calls

        def failing(*args: Any, **options: Any) -> Any:
            if gate.calls == 2 * last - 1:
                raise error
            return forward(*args, **options)

        patch.setattr(Head, "forward", failing)
        stream, found = lm.stream(prompts(LENGTHS), 4, stop=()), []
        with pytest.raises(LaneError) as raised:
            found.extend(iter(stream.__next__, None))
        assert raised.value.__cause__ is error and list(stream) == []
    assert len(list(lm.stream(prompts(LENGTHS), 4, stop=()))) == whole


def test_what_cannot_be_served_is_refused_at_once(lm: OptLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="max_new_tokens"):
        lm.stream(prompts([3]), 0)
    with pytest.raises(RequestError, match="top_p"):
        lm.stream(prompts([3]), top_p=2)
    with pytest.raises(TypeError, match="warmth"):
        lm.stream(prompts([3]), warmth=2)


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_bars_are_for_terminals_and_on_request(
    progress: bool | None, terminal: bool, shown: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal))
    with OptLM(tiny("opt").directory, Policy(), device="cpu", progress=progress) as lm:
        assert ("weights" in screen.getvalue()) == shown
        list(lm.stream([[5, 6, 7]], 4, stop=()))
        assert "tokens" not in screen.getvalue(), "whoever takes the rows shows how far it is"
        lm.generate([[5, 6, 7]], 4, stop=())
        assert ("tokens" in screen.getvalue()) == shown


# Reports


def test_stats_come_with_the_ids(lm: OptLM, prompts: Any) -> None:
    given = prompts(LENGTHS)
    ids, report = lm.generate(given, TOKENS, stop=(), stats=True)
    np.testing.assert_array_equal(ids, lm.generate(given, TOKENS, stop=()))
    assert (report.num_prompts, report.prompt_len, report.gen_len) == (len(given), max(LENGTHS), TOKENS)
    assert report.new_tokens is None and report.prompt_tokens == sum(LENGTHS)
    assert report.throughput_tokens_s == pytest.approx(len(given) * TOKENS / report.total_s)
    assert report.policy == lm.policy and report.device == lm.device and report.dtype == "float32"
    assert report.placement["weights"].keys() == lm.placement.percent.keys()
    rows = ids[:, max(LENGTHS) :]
    stops = stops_of(rows)
    _, report = lm.generate(given, TOKENS, stop=stops, stats=True)
    made = sum(len(up_to_stop(row, stops)) for row in rows)
    assert report.new_tokens == made and f"{made} in total" in report.card()
    assert report.throughput_tokens_s == pytest.approx(made / report.total_s)
    assert report.decode_tokens_s == pytest.approx((made - len(given)) / report.decode_s)
    _, report = lm.generate(given, TOKENS, stop=(), cut_gen_len=4, stats=True)
    assert report.projected_from == 4 and report.new_tokens is None
    assert report.decode_s == pytest.approx(lm.stats.timing.decode * (TOKENS - 1) / 3)
    with pytest.raises(RequestError, match="cut_gen_len is 1"):
        lm.generate(given, TOKENS, cut_gen_len=1, stats=True)


def test_a_projection_counts_tokens_that_ran(lm: OptLM, prompts: Any) -> None:
    given = prompts(LENGTHS[:6])  # one block
    rows = lm.generate(given, 6, stop=())[:, max(LENGTHS[:6]) :]
    stops = rows[:, 3].tolist()
    ran = max(len(up_to_stop(row, stops)) for row in rows)
    assert 1 < ran < 6
    _, report = lm.generate(given, 30, stop=stops, cut_gen_len=6, stats=True)
    assert lm.stats is not None and lm.stats.timing.ran == [ran] and report.projected_from == ran
    assert report.decode_s == pytest.approx(lm.stats.timing.decode * 29 / (ran - 1))
    # All rows ended with their first token: there is no more, and nothing to project.
    _, report = lm.generate(given, 30, stop=rows[:, 0].tolist(), cut_gen_len=6, stats=True)
    assert report.new_tokens == 6 and report.projected_from is None
    assert report.decode_tokens_s == 0


# Text


@pytest.fixture(scope="module")
def demo() -> Iterator[OptLM]:
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights={"cpu": 60, "disk": 40})
    with OptLM("demo", policy, device="cpu", dtype="float32", progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def completions() -> list[str]:
    """What transformers makes of the texts."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=24, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_completions_are_those_of_transformers(demo: OptLM, completions: list[str]) -> None:
    found, report = demo.generate_text(TEXTS, 24, stats=True)
    assert found == completions and all(found)
    assert report.num_prompts == len(TEXTS)
    assert demo.generate_text([demo.tokenizer(text).input_ids for text in TEXTS], 24) == completions


def test_a_stop_string_cuts_the_text_and_ends_the_row(demo: OptLM, completions: list[str]) -> None:
    stop = completions[0][2:4]
    whole = demo.generate_text(TEXTS, 24, stats=True)[1]
    found, report = demo.generate_text(TEXTS, 24, stop=stop, stats=True)
    assert found == [text.partition(stop)[0] for text in completions] != completions
    made = [24 * len(TEXTS) if r.new_tokens is None else r.new_tokens for r in (whole, report)]
    assert made[1] < made[0]
    assert demo.generate_text(TEXTS, 24, stop=["never", "ever"]) == completions


def test_text_comes_in_pieces(demo: OptLM, completions: list[str]) -> None:
    pieces = list(demo.stream_text(TEXTS[0], 24))
    assert "".join(pieces) == completions[0] and len(pieces) > 3 and all(pieces)
    stop = completions[0][3:5]
    assert "".join(demo.stream_text(TEXTS[0], 24, stop=stop)) == completions[0].partition(stop)[0]
    drawn = dict(do_sample=True, temperature=1.5, seed=5)
    assert "".join(demo.stream_text(TEXTS[0], 24, **drawn)) == demo.generate_text(TEXTS[:1], 24, **drawn)[0]


@pytest.mark.parametrize("within", [None, 1, 2])
def test_texts_come_as_they_end(demo: OptLM, completions: list[str], within: int | None) -> None:
    stop = completions[0][2:4]
    for stops in ((), stop):
        cut = [text.partition(stop)[0] if stops else text for text in completions]
        found = list(demo.stream_texts(TEXTS, 24, stop=stops, sort_within=within))
        assert sorted(found) == list(enumerate(cut))
    counts = [3, 24, 5]
    found = dict(demo.stream_texts(TEXTS, counts, sort_within=within))
    assert found[1] == completions[1]
    assert [found[n] for n in range(3)] == demo.generate_text(TEXTS, counts)
    assert all(text.startswith(found[n]) for n, text in enumerate(completions))
    with pytest.raises(RequestError, match="sort_within is 0; it must be a whole number >= 1"):
        demo.stream_texts(TEXTS, 24, sort_within=0)


def test_what_might_have_begun_a_stop_comes_at_the_end(demo: OptLM) -> None:
    (text,) = demo.generate_text(TEXTS[1:2], 3)
    stop = f"{text[-1]} and more"
    assert demo.generate_text(TEXTS[1:2], 3, stop=stop) == [text]
    assert "".join(demo.stream_text(TEXTS[1], 3, stop=stop)) == text


class DropsTheFirst:
    """A tokenizer that drops what a text begins with, as some do with a space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, **options: Any) -> str:
        text: str = self._tokenizer.decode(ids, **options)
        return text[1:]


def test_a_completion_is_no_beginning_of_a_text(
    demo: OptLM, completions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [demo.tokenizer(text).input_ids for text in TEXTS]
    monkeypatch.setattr(demo, "tokenizer", DropsTheFirst(demo.tokenizer))
    assert demo.generate_text(prompts, 24) == completions
    assert demo.generate_text(prompts, 24, stop="never") == completions
    assert "".join(demo.stream_text(prompts[0], 24)) == completions[0]


@pytest.fixture
def chatting(demo: OptLM, monkeypatch: pytest.MonkeyPatch) -> OptLM:
    """The embedded model with a chat template, which writes the BOS token as those of chat models do."""
    template = "</s>{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(demo.tokenizer, "chat_template", template, raising=False)
    return demo


def test_a_chat_is_a_prompt(chatting: OptLM, completions: list[str]) -> None:
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    rendered = [f"</s>{text}" for text in TEXTS]
    tokens = 24
    expected = chatting.generate_text(TEXTS, tokens)
    assert chatting.generate_text(chats, tokens) == expected
    assert chatting.generate_text(rendered, tokens) == expected, "a rendered chat gets no second BOS"
    assert "".join(chatting.stream_text(chats[0], tokens)) == expected[0]
    for ours, theirs in zip(chatting.score(chats), chatting.score(TEXTS), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RequestError, match="texts is one chat"):
        chatting.generate_text(chats[0])


def test_special_tokens_can_be_left_out(demo: OptLM) -> None:
    with_bos, without = (demo.score(TEXTS, special_tokens=special) for special in (True, False))
    assert [len(a) - len(b) for a, b in zip(with_bos, without, strict=True)] == [1, 1, 1]
    ids = [demo.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert demo.generate_text(TEXTS, 4, special_tokens=False) == demo.generate_text(ids, 4)


def test_scores_of_texts(demo: OptLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    for text, found in zip(TEXTS, demo.score(TEXTS, rows=2), strict=True):
        ids = torch.tensor(demo.tokenizer(text).input_ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        expected = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_ids_that_begin_with_the_pad_id_are_scored_whole(lm: OptLM) -> None:
    texts = [[PAD, 5, 6], [PAD, 7, 8]]
    logits = lm.forward(texts, np.ones((2, 3), dtype=int))
    for n, scores in enumerate(lm.score(texts)):
        torch.testing.assert_close(scores, log_likelihoods(logits[n], texts[n]))


def test_refusals_of_texts(lm: OptLM, demo: OptLM) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        lm.generate_text(["a text"])
    with pytest.raises(RequestError, match="must be a list of texts"):
        demo.generate_text("a text")
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        demo.generate_text([[5], []])
    with pytest.raises(RequestError, match="stop contains 5"):
        demo.generate_text(TEXTS, stop=[5])  # type: ignore[list-item]
    for rows in (0, -1, 1.5):
        with pytest.raises(RequestError, match=f"rows is {rows}"):
            demo.score(TEXTS, rows)  # type: ignore[arg-type]
    for none in ([], ()):
        with pytest.raises(RequestError, match="no prompts"):
            demo.score(none)
    with pytest.raises(RequestError, match=r"^prompt 2 has 513 ids, which exceed the 512 .* Shorten it$"):
        demo.score([TEXTS[0], [5], [5] * 513, [6] * 511], rows=1)
    with pytest.raises(RequestError, match="positions of demo"):
        demo.stream_text(TEXTS[0], 600)


def test_ctrl_c_before_a_stream_is_returned_leaves_no_run(
    tiny: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of a Python function that `stream` makes; a run ends only when it is abandoned."""
    calls, interrupted_streams, begin = 0, 0, Stream.__init__.__code__
    runs: list[threading.Event] = []

    def endless(*args: Any, check: Callable[[], object], **options: Any) -> None:
        runs.append(ended := threading.Event())
        try:
            while True:
                check()
        finally:
            ended.set()

    with OptLM(tiny("opt").directory, mixed(), device="cpu", progress=False) as lm:
        expected = lm.generate([[5, 6, 7]], 3, stop=())
        with monkeypatch.context() as patch:
            patch.setattr(lm, "generate_with", endless)
            while True:
                left, begun = calls, False

                def interrupt(frame: Any, event: str, arg: Any) -> None:
                    nonlocal left, begun
                    if event == "call":
                        begun = begun or frame.f_code is begin
                        left -= 1
                        if left < 0:
                            sys.setprofile(None)
                            raise KeyboardInterrupt

                sys.setprofile(interrupt)
                try:
                    stream = lm.stream([[5, 6, 7]], 3, stop=())
                except KeyboardInterrupt:
                    interrupted_streams += begun
                else:
                    break
                finally:
                    sys.setprofile(None)
                calls += 1
            stream.close()
        assert interrupted_streams > 5 and runs
        assert all(ended.wait(PATIENCE) for ended in runs), "a run continues after its stream was interrupted"
        assert (lm.generate([[5, 6, 7]], 3, stop=()) == expected).all()
