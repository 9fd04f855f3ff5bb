"""Streams, text and scores, built on a model's calls that take and return ids."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from torch import Tensor

from flexgen.engine import scoring
from flexgen.engine.calls import CallPlans
from flexgen.engine.completion import Completion
from flexgen.engine.decoded import DecodedTexts, EndedRows
from flexgen.engine.row_options import RowOptions, check_all, choice_of, stops_of
from flexgen.engine.text import Decoder, Messages, encode, encode_chat, is_chat, load_tokenizer, stop_strings
from flexgen.errors import RequestError, shown
from flexgen.models import ModelSpec
from flexgen.results.report import Report
from flexgen.runtime.choice import Choice, Limited, limited
from flexgen.runtime.request import (
    IdRows,
    NewTokenCounts,
    Request,
    check_length,
    check_positions,
    check_whole,
    new_token_counts,
    read_request,
)
from flexgen.runtime.stats import Stats
from flexgen.runtime.stream import Stream, StreamWriter

Text = str | Sequence[int] | np.ndarray | Messages
"""A string, the ids of a text, or a chat. A chat is a list of messages, which the tokenizer's template renders."""


class Conveniences(ABC):
    """Methods built only on a model's `generate_with` and `forward`, so they run with the model's policy."""

    spec: ModelSpec
    tokenizer_dir: Path | None
    _plans: CallPlans
    stats: Stats | None = None
    """The statistics of the last call."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[Stream[Any]] = weakref.WeakSet()

    @abstractmethod
    def generate_with(self, *args: Any, **options: Any) -> np.ndarray:
        """Generate for prompts that were read, with any choice of the next id."""

    @abstractmethod
    def forward(self, *args: Any, **options: Any) -> Tensor:
        """The logits of every position."""

    @abstractmethod
    def sampled(self, *args: Any, **sampling: Any) -> Choice:
        """The choice of the next id for sampling arguments."""

    @abstractmethod
    def last_report(self, request: Request, max_new_tokens: int, tokens: int) -> Report:
        """The report of the last call."""

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's directory. Raises ModelError if there is none."""
        return load_tokenizer(self.tokenizer_dir, self.spec.name)

    def stream(
        self,
        inputs: IdRows,
        max_new_tokens: NewTokenCounts = 32,
        *,
        attention_mask: Any = None,
        **sampling: Any,
    ) -> Stream[tuple[int, np.ndarray]]:
        """Return an iterator over (number of the prompt, its new ids), in the order in which rows end.

        The new ids are an int64 array. It ends with the stop id, if the row has one.

        inputs: the prompts, as in `generate`.
        max_new_tokens: the number of tokens to generate for each prompt, or one number per prompt, as in `generate`.
        attention_mask: as in `generate`.
        sampling: do_sample, temperature, stop, top_k, top_p and seed, as in `generate`.

        The model runs in a thread and does not wait for the reader. To end the run early, close the iterator (`close`
        or `with`) or drop it. No other call of this model can run until the stream has ended.

        Raises as `generate` does. CapacityError and LaneError are raised by the iterator.
        """
        request = read_request(self.spec, inputs, attention_mask)
        counts = new_token_counts(self.spec, request, max_new_tokens)
        choice = limited(self.sampled(**sampling), counts)

        def run(writer: StreamWriter[tuple[int, np.ndarray]]) -> None:
            listeners = [EndedRows(writer.put)]
            self.generate_with(Completion(request, counts, choice), listeners=listeners, check=writer.check)

        return self._streaming(run)

    def stream_text(
        self,
        prompt: Text,
        max_new_tokens: int = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        **sampling: Any,
    ) -> Stream[str]:
        """Return an iterator over the pieces of one prompt's completion, as they are generated.

        The joined pieces are the text that `generate_text` returns.

        prompt: a string, an id list or a chat.
        max_new_tokens, stop, special_tokens, sampling: as in `generate_text`.

        The stream runs, ends and raises as that of `stream` does.
        """
        request = self._read([prompt], special_tokens)
        check_length(self.spec, request, max_new_tokens)
        choice, stops, tokenizer = self.sampled(**sampling), stop_strings(stop), self.tokenizer

        def run(writer: StreamWriter[str]) -> None:
            def emit(row: int, piece: str) -> None:
                if piece:
                    writer.put(piece)

            texts = DecodedTexts(choice, tokenizer, request.prompts, [stops], emit)
            self.generate_with(Completion(request, max_new_tokens, texts), check=writer.check)
            texts.finish()

        return self._streaming(run)

    @overload
    def generate_text(
        self,
        prompts: Sequence[Text],
        max_new_tokens: NewTokenCounts = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        stats: Literal[False] = False,
        **sampling: Any,
    ) -> list[str]: ...

    @overload
    def generate_text(
        self,
        prompts: Sequence[Text],
        max_new_tokens: NewTokenCounts = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        stats: Literal[True],
        **sampling: Any,
    ) -> tuple[list[str], Report]: ...

    def generate_text(
        self,
        prompts: Sequence[Text],
        max_new_tokens: NewTokenCounts = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        stats: bool = False,
        **sampling: Any,
    ) -> list[str] | tuple[list[str], Report]:
        """Return the completion of each prompt, as text without special tokens.

        prompts: a list of strings, id lists or chats.
        max_new_tokens: the number of tokens to generate for each prompt, or one number per prompt, as in `generate`.
        stop: a string or several. The first one that appears ends the completion, which does not contain it. A
            special token (`"<|im_end|>"`) can be a stop string. The model's end ids end a completion too.
        special_tokens: whether to start each text with the special tokens that the tokenizer adds, such as BOS. A
            text that starts with BOS does not get a second one, and a chat has the special tokens of its template.
        stats: whether to return the call's `Report` too.
        sampling: do_sample, temperature, top_k, top_p and seed, as in `generate`.

        Raises ModelError if the model has no tokenizer, or no chat template for a chat, and as `generate` does.
        """
        request = self._read(prompts, special_tokens)
        counts = new_token_counts(self.spec, request, max_new_tokens)
        texts = [""] * len(request.prompts)
        stops = [stop_strings(stop)] * len(request.prompts)
        self._complete(request, counts, stops, self.sampled(**sampling), texts.__setitem__)
        return (texts, self.last_report(request, max(counts), max(counts))) if stats else texts

    def stream_texts(
        self,
        prompts: Sequence[Text],
        max_new_tokens: NewTokenCounts = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        sort_within: int | None = None,
        options: Sequence[RowOptions] | None = None,
        **sampling: Any,
    ) -> Stream[tuple[int, str]]:
        """Return an iterator over (number of the prompt, its completion), in the order in which rows end.

        The completions are those of `generate_text`.

        prompts, max_new_tokens, stop, special_tokens, sampling: as in `generate_text`.
        sort_within: prompts are sorted by length, which saves padding, but only within groups of this number, so that
            early prompts are answered early. None sorts all.
        options: for each prompt, values that replace those of `stop` and `sampling`, see `RowOptions`.

        The stream runs, ends and raises as that of `stream` does.
        """
        request = self._read(prompts, special_tokens)
        if sort_within is not None:
            check_whole("sort_within", sort_within, 1)
            request = replace(request, sorted_in=sort_within)
        counts = new_token_counts(self.spec, request, max_new_tokens)
        options = [{}] * len(request.prompts) if options is None else options
        check_all(options, len(request.prompts))
        stops, choice = stops_of(options, stop), choice_of(options, self.sampled, sampling)

        def run(writer: StreamWriter[tuple[int, str]]) -> None:
            def ended(row: int, text: str) -> None:
                writer.put((row, text))

            self._complete(request, counts, stops, choice, ended, check=writer.check)

        return self._streaming(run)

    def _complete(
        self,
        request: Request,
        counts: Sequence[int],
        stops: Sequence[Sequence[str]],
        choice: Choice,
        ended: Callable[[int, str], object],
        **options: Any,
    ) -> None:
        """Generate up to `counts` tokens for each prompt, and call `ended` with each row that ends and its text."""
        tokenizer = self.tokenizer
        if any(stops):
            pieces: list[list[str]] = [[] for _ in request.prompts]

            def emit(row: int, piece: str) -> None:
                pieces[row].append(piece)

            texts = DecodedTexts(Limited(choice, counts), tokenizer, request.prompts, stops, emit)
            texts.when_ended = lambda row: ended(row, "".join(pieces[row]))
            self.generate_with(Completion(request, counts, texts), **options)
            return

        def decode(row_and_ids: tuple[int, np.ndarray]) -> None:
            # All ids at once: to decode them as they arrive takes longer than a small model takes to generate them.
            row, ids = row_and_ids
            decoder = Decoder(tokenizer, request.prompts[row])
            ended(row, decoder.add(ids) + decoder.end())

        completion = Completion(request, counts, limited(choice, counts))
        self.generate_with(completion, listeners=[EndedRows(decode)], **options)

    def score(
        self, texts: Sequence[Text], rows: int = scoring.ROWS, *, special_tokens: bool = True
    ) -> list[Tensor]:
        """Return the log-likelihood of every token, given the tokens before it: for each text float32 (tokens - 1).

        The first token has no log-likelihood. It is the special token that the tokenizer adds, if it adds one.

        texts: a list of strings, id lists or chats.
            Texts that begin with the same ids, such as the possible answers to one question, run together if that
            saves time, and the common ids are computed once.
        rows: the maximum number of texts that run at a time. Their logits (rows, longest, vocab) are in host memory.
        special_tokens: as in `generate_text`.

        Raises as `forward` does.
        """
        check_whole("rows", rows, 1)
        request = self._read(texts, special_tokens)
        check_positions(self.spec, request, 0)  # checked here, where errors can name a text by its number

        def forward(ids: Sequence[Sequence[int]]) -> Tensor:
            return self.forward(ids, _all(ids))

        texts_ids = [ids.tolist() for ids in request.prompts]
        # A call for texts that share a beginning has two passes: for the beginning, and for the rest.
        return scoring.score(forward, texts_ids, rows, 2 * self._plans.pass_positions)

    def _read(self, texts: Sequence[Text], special_tokens: bool) -> Request:
        if isinstance(texts, str):
            raise RequestError(f"texts is the string {shown(texts)}; it must be a list of texts: pass [text]")
        if not isinstance(texts, Iterable) or getattr(texts, "shape", None) == ():
            raise RequestError(f"texts is {shown(texts)}; it must be a list of texts")
        if is_chat(texts):
            raise RequestError("texts is one chat; it must be a list of chats: pass [messages]")
        ids: list[Any] = [self._encoded(text, special_tokens) for text in texts]
        whole = all(_is_row(row) for row in ids)
        return read_request(self.spec, ids, _all(ids) if whole and ids else None)

    def _encoded(self, text: Any, special_tokens: bool) -> Any:
        if isinstance(text, str):
            return encode(self.tokenizer, text, special_tokens)
        return encode_chat(self.tokenizer, text) if is_chat(text) else text

    def _streaming(self, run: Callable[[StreamWriter[Any]], object]) -> Stream[Any]:
        stream: Stream[Any] | None = None
        try:
            stream = Stream(run)
            self._streams.add(stream)
            return stream
        except BaseException:  # Ctrl-C: no caller gets the stream
            if stream is not None:
                stream.close()
            raise

    def _end_streams(self) -> None:
        for stream in list(self._streams):
            stream.close()


def _is_row(row: object) -> bool:
    """Whether it is not empty and can be the ids of one text."""
    if isinstance(row, np.ndarray):
        return row.ndim == 1 and bool(row.size)
    return isinstance(row, Sequence) and bool(row)


def _all(ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The mask of prompts without padding. A tokenizer may start texts with an id that is also the pad id."""
    return [np.ones(len(row), dtype=np.int64) for row in ids]
