"""For which rows of a call transformers' processors and criteria can be called, and processors made for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from flexgen.runtime.choice import Rows

_WITHOUT_STATE = {
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
}
"""What gives a row the same result whatever other rows it is called with, and whatever it was called with before.
These very classes: a subclass may do anything."""

_OF_PROMPTS = {
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
}
"""What holds a value for each row, and is right for any rows whose prompts it was made for."""


def independent_of_rows(parts: Iterable[object]) -> bool:
    """Whether processors or criteria can be called for some rows of a call at a time, in any order."""
    return all(type(part) in _WITHOUT_STATE for part in parts)


class RowProcessors(LogitsProcessorList):
    """A call's logits processors: a list as transformers makes it, and lists for some rows of the call at a time.

    As a list it is `made`, which generation loops of transformers use. `of` gives the list for the rows of one GPU
    batch, because some processors hold a value for each row: `build` makes it, with `given`, the caller's own
    processors, among them.

    `whole_call`: whether some must see all rows at every step, because they may keep state: those of the caller, a
    caller's function of allowed ids, the SynthID watermark.
    """

    def __init__(
        self,
        made: LogitsProcessorList,
        build: Callable[[Rows], LogitsProcessorList],
        given: Sequence[object] = (),
    ) -> None:
        super().__init__(made)
        self._build = build
        self._of_rows: dict[tuple[int, ...], LogitsProcessorList] = {}
        own = {id(processor) for processor in given}
        made_for_rows = (p for p in made if id(p) in own or type(p) not in _OF_PROMPTS)
        self.whole_call = not independent_of_rows(made_for_rows)

    def of(self, rows: Rows) -> LogitsProcessorList:
        key = tuple(rows)
        if key not in self._of_rows:
            self._of_rows[key] = self._build(key)
        return self._of_rows[key]
