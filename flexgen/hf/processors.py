"""Calls of transformers' processors and criteria for some rows of a call, and processors for these rows."""

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
"""Processors and criteria whose result for a row depends neither on other rows nor on earlier calls. Subclasses do
not count, because they may do anything."""

_OF_PROMPTS = {
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
}
"""Processors with a value for each row. They are valid for the rows whose prompts they were created with."""


def independent_of_rows(parts: Iterable[object]) -> bool:
    """Whether processors or criteria can be called for some rows at a time, in any order."""
    return all(type(part) in _WITHOUT_STATE for part in parts)


class RowProcessors(LogitsProcessorList):
    """The logits processors of a call: a list for all rows, and lists for some rows.

    As a list it is `made`, for the generation loops of transformers. `of` returns the list for the rows of one batch,
    which is needed because some processors have a value for each row. `build` creates it, including `given`, the
    caller's own processors.

    whole_call: whether some processors need all rows at every step, because they may keep state: the caller's own
    processors, the caller's function of allowed ids, and the SynthID watermark.
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
