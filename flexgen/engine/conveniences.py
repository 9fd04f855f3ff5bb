"""Calls of a model that are built on ids in and ids out: rows as they end, text, scores of texts."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from flexgen.engine import scoring
from flexgen.engine.completion import Completion
from flexgen.engine.text import Decoder, Messages, encode, encode_chat, is_chat, load_tokenizer, stop_strings
from flexgen.errors import RequestError, shown
from flexgen.models import ModelSpec
from flexgen.results.report import Report
from flexgen.runtime.choice import Choice, NewIds, Rows
from flexgen.runtime.request import (
    IdRows,
    Request,
    check_length,
    check_positions,
    check_whole,
    read_request,
)
from flexgen.runtime.stats import Stats
from flexgen.runtime.stream import Stream, Teller

Text = str | Sequence[int] | np.ndarray | Messages
"""A text, its ids, or a chat: a list of messages, which the tokenizer's template renders."""


class Conveniences(ABC):
    """Built on a model's `generate_with` and `forward` alone; all of it runs under the model's policy."""

    spec: ModelSpec
    tokenizer_dir: Path | None
    stats: Stats | None = None
    """Of the last call."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[Stream[Any]] = weakref.WeakSet()

    @abstractmethod
    def generate_with(self, *args: Any, **options: Any) -> np.ndarray:
        """New ids for prompts that were read, by any choice of the next id."""

    @abstractmethod
    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Logits of every position."""

    @abstractmethod
    def sampled(self, *args: Any, **sampling: Any) -> Choice:
        """The choice that sampling arguments ask for."""

    @abstractmethod
    def last_report(self, request: Request, max_new_tokens: int, tokens: int) -> Report:
        """What the last call took."""

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's directory. Raises ModelError where there is none."""
        return load_tokenizer(self.tokenizer_dir, self.spec.name)

    def stream(
        self, inputs: IdRows, max_new_tokens: int = 32, *, attention_mask: Any = None, **sampling: Any
    ) -> Stream[tuple[int, np.ndarray]]:
        """An iterator over (number of the prompt, its new ids), in the order in which the prompts' rows end.

        The new ids are an int64 array that ends with the stop id, if one came. `sampling`: do_sample, temperature,
        stop, top_k, top_p and seed, as in `generate`. The run continues in a thread, whether rows are taken or not;
        leaving the iterator early (`close`, `with`, dropping it) ends the run and frees what it held. No other call
        of this model can run meanwhile. Raises as `generate` does; what does not fit (CapacityError) or fails
        (LaneError) shows where the next row would come.
        """
        request = read_request(self.spec, inputs, attention_mask)
        check_length(self.spec, request, max_new_tokens)
        choice = self.sampled(**sampling)

        def run(teller: Teller[tuple[int, np.ndarray]]) -> None:
            listeners = [_EndedRows(teller.tell)]
            self.generate_with(
                Completion(request, max_new_tokens, choice), listeners=listeners, check=teller.check
            )

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
        """An iterator over the pieces of one prompt's completion as they are made; joined, they are what
        `generate_text` gives. Ends and raises as `stream` does."""
        request = self._read([prompt], special_tokens)
        check_length(self.spec, request, max_new_tokens)
        choice, stops, tokenizer = self.sampled(**sampling), stop_strings(stop), self.tokenizer

        def run(teller: Teller[str]) -> None:
            def tell(row: int, piece: str) -> None:
                if piece:
                    teller.tell(piece)

            texts = _Texts(choice, tokenizer, request.prompts, stops, tell)
            self.generate_with(Completion(request, max_new_tokens, texts), check=teller.check)
            texts.finish()

        return self._streaming(run)

    @overload
    def generate_text(
        self,
        prompts: Sequence[Text],
        max_new_tokens: int = 32,
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
        max_new_tokens: int = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        stats: Literal[True],
        **sampling: Any,
    ) -> tuple[list[str], Report]: ...

    def generate_text(
        self,
        prompts: Sequence[Text],
        max_new_tokens: int = 32,
        *,
        stop: str | Iterable[str] = (),
        special_tokens: bool = True,
        stats: bool = False,
        **sampling: Any,
    ) -> list[str] | tuple[list[str], Report]:
        """The completion of each prompt (a text, ids, or a chat), as text without special tokens.

        stop: texts of which the first to come ends a completion, and is not part of it; the model's own end ids
            end it too. A special token ("<|im_end|>") can be one.
        special_tokens: begin each text with the special tokens that the tokenizer adds, such as BOS, unless the
            text begins with it already. A chat has those of its template.
        stats: also return the call's `Report`. sampling: do_sample, temperature, top_k, top_p and seed, as in
            `generate`.

        Raises ModelError where the model has no tokenizer, or no chat template for a chat, and as `generate` does.
        """
        request = self._read(prompts, special_tokens)
        stops, choice = stop_strings(stop), self.sampled(**sampling)
        texts_of: list[list[str]] = [[] for _ in request.prompts]
        if stops:
            texts = _Texts(
                choice, self.tokenizer, request.prompts, stops, lambda row, piece: texts_of[row].append(piece)
            )
            self.generate_with(Completion(request, max_new_tokens, texts))
            texts.finish()
        else:
            # Decoding as ids come would take the host longer than a small model takes to make them.
            tokenizer, rows = self.tokenizer, dict[int, np.ndarray]()
            listener = _EndedRows(lambda ended: rows.update([ended]))
            self.generate_with(Completion(request, max_new_tokens, choice), listeners=[listener])
            for n, prompt in enumerate(request.prompts):
                decoder = Decoder(tokenizer, prompt)
                texts_of[n] = [decoder.add(rows[n]), decoder.end()]
        found = ["".join(pieces) for pieces in texts_of]
        return (found, self.last_report(request, max_new_tokens, max_new_tokens)) if stats else found

    def score(
        self, texts: Sequence[Text], rows: int = scoring.ROWS, *, special_tokens: bool = True
    ) -> list[Tensor]:
        """Log-likelihood of every token of each text (or ids) given those before it: float32 (tokens - 1) each.

        The first token has none; a text's is what its tokenizer begins texts with, where it does and unless
        `special_tokens` is False. At most `rows`
        texts run at a time: their logits (rows, longest, vocabulary) are held in host memory. Raises as
        `forward` does.
        """
        check_whole("rows", rows, 1)
        request = self._read(texts, special_tokens)
        check_positions(self.spec, request, 0)  # here, where a text has its number among all of them

        def forward(ids: Sequence[Sequence[int]]) -> Tensor:
            return self.forward(ids, _all(ids))

        return scoring.score(forward, [ids.tolist() for ids in request.prompts], rows)

    def _read(self, texts: Sequence[Text], special_tokens: bool) -> Request:
        if isinstance(texts, str):
            raise RequestError(f"texts are the one text {shown(texts)}; give a list of texts")
        if not isinstance(texts, Iterable) or getattr(texts, "shape", None) == ():
            raise RequestError(f"texts are {shown(texts)}; give a list of texts")
        if is_chat(texts):
            raise RequestError("texts are the messages of one chat; give a list of chats: [messages]")
        ids: list[Any] = [self._encoded(text, special_tokens) for text in texts]
        whole = all(_is_row(row) for row in ids)
        return read_request(self.spec, ids, _all(ids) if whole and ids else None)

    def _encoded(self, text: Any, special_tokens: bool) -> Any:
        if isinstance(text, str):
            return encode(self.tokenizer, text, special_tokens)
        return encode_chat(self.tokenizer, text) if is_chat(text) else text

    def _streaming(self, run: Callable[[Teller[Any]], object]) -> Stream[Any]:
        stream: Stream[Any] | None = None
        try:
            stream = Stream(run)
            self._streams.add(stream)
            return stream
        except BaseException:  # Ctrl-C: nobody gets the stream
            if stream is not None:
                stream.close()
            raise

    def _end_streams(self) -> None:
        for stream in list(self._streams):
            stream.close()


def _is_row(row: object) -> bool:
    """Whether it can be the ids of one text, and is not empty."""
    if isinstance(row, np.ndarray):
        return row.ndim == 1 and bool(row.size)
    return isinstance(row, Sequence) and bool(row)


def _all(ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The mask of prompts without padding: a tokenizer may begin texts with what is also the pad id."""
    return [np.ones(len(row), dtype=np.int64) for row in ids]


class _EndedRows:
    """A listener that tells (row, its new ids) when a row has ended."""

    def __init__(self, tell: Callable[[tuple[int, np.ndarray]], object]) -> None:
        self._tell = tell
        self._ids: dict[int, list[int]] = {}

    def __call__(self, new: NewIds) -> None:
        columns = new.rows, new.ids.tolist(), new.live.tolist(), new.ended.tolist()
        for row, id, live, ended in zip(*columns, strict=True):
            if live:
                self._ids.setdefault(row, []).append(id)
            if ended:
                self._tell((row, np.array(self._ids.pop(row), dtype=np.int64)))


class _Texts:
    """A choice that decodes each row as its ids come, tells the pieces, and ends a row at a stop string."""

    can_end = True
    whole_call = False

    def __init__(
        self,
        choice: Choice,
        tokenizer: Any,
        prompts: Sequence[np.ndarray],
        stop: Sequence[str],
        tell: Callable[[int, str], object],
    ) -> None:
        self._choice = choice
        self._tell = tell
        self._open = {n: Decoder(tokenizer, prompt, stop) for n, prompt in enumerate(prompts)}

    def choose(self, logits: Tensor, rows: Rows, token: int) -> Tensor:
        return self._choice.choose(logits, rows, token)

    def ends(self, ids: Tensor, rows: Rows, token: int) -> Tensor:
        ended = torch.zeros(len(ids), dtype=torch.bool)
        if self._choice.can_end:
            ended |= self._choice.ends(ids, rows, token)
        for place, (row, id) in enumerate(zip(rows, ids.tolist(), strict=True)):
            if row not in self._open:
                continue
            decoder = self._open[row]
            self._tell(row, decoder.add([id]))
            if decoder.stopped or ended[place]:
                ended[place] = True
                self._end(row)
        return ended

    def finish(self) -> None:
        """Tell what still waits, after the last token."""
        for row in list(self._open):
            self._end(row)

    def _end(self, row: int) -> None:
        self._tell(row, self._open.pop(row).end())
