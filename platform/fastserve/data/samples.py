"""From rows to samples: token ids, and which of them the model learns to write.

A sample is a pure function of its row, the tokenizer, the template and the length limit, so that a run that begins anew
on other workers sees the same tokens in the same order. Whether a row has something to learn is asked after it was cut,
never before: a long question with its answer beyond the limit teaches nothing and must not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.data.rows import Row, read_rows
from fastserve.data.template import Span, assistant_spans, prints_tool_calls
from fastserve.errors import DatasetInvalid, SourceInvalid
from fastserve.plan.facts import DatasetFacts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CANNOT_PRINT_TOOL_CALLS = "the chat template cannot print tool calls"
NO_ASSISTANT_MESSAGE = "no assistant message"

RENDERED_ON = date(2026, 1, 1)
"""The day that is shown by templates which print one: the same rows give the same samples on any day."""

_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """What a model is shown of one row."""

    ids: Sequence[int]
    """Token ids, shape [tokens]."""

    trained: Sequence[bool]
    """Whether the loss of predicting each token counts, shape [tokens]; never the first, which nothing precedes."""

    digest: str
    """Digest of the row, the same whichever file it came from."""

    place: str
    """`file:line` of the row."""

    full_length: int
    """Tokens before the cut."""

    @property
    def trained_tokens(self) -> int:
        """Tokens whose loss counts."""
        return sum(self.trained)


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The samples of a data set, in the order of its rows, and what became of the other rows."""

    samples: Sequence[Sample]
    facts: DatasetFacts


@dataclass(frozen=True, slots=True)
class _Shown:
    row: Row
    text: str
    spans: Sequence[Span]


def samples(
    paths: Iterable[Path],
    tokenizer: Tokenizer,
    template: str | None,
    max_length: int,
    *,
    special: Mapping[str, str] | None = None,
    limit_name: str = "maxLength",
) -> SampleSet:
    """Samples of all rows in `paths` that have something to learn.

    tokenizer: of the model that is trained.
    template: Jinja source of its chat template; None for a model without one, which learns from text rows only.
    max_length: most tokens of a sample; what is beyond is cut.
    special: texts of special tokens by their usual names, such as `bos_token`.
    limit_name: what the manifest calls `max_length` where this set is named.

    Raises DatasetInvalid with file and line for a row that cannot be read, and when no row is left that teaches
    anything; SourceInvalid when chat rows meet a model without a template.
    """
    files = [Path(path) for path in paths]
    rows = (row for path in files for row in read_rows(path))
    tally = _Tally(beyond_limit=f"no assistant token within {limit_name}")
    kept: list[Sample] = []
    shown = _shown(rows, template, special or {}, tally)
    while chunk := list(islice(shown, _CHUNK_ROWS)):
        encodings = tokenizer.encode_batch([item.text for item in chunk], add_special_tokens=False)
        for item, encoding in zip(chunk, encodings, strict=True):
            sample = _sample(item, encoding.ids, [start for start, _ in encoding.offsets], max_length)
            if tally.take(sample):
                kept.append(sample)
    if not kept:
        raise _nothing_left(files, tally, max_length, limit_name)
    return SampleSet(samples=kept, facts=tally.facts())


@dataclass(slots=True)
class _Tally:
    beyond_limit: str
    rows: int = 0
    used: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def take(self, sample: Sample) -> bool:
        """Count a sample; False when it has nothing to learn."""
        self.longest = max(self.longest, sample.full_length)
        if not any(sample.trained):
            self.left_out[self.beyond_limit] += 1
            return False
        self.used += 1
        self.truncated += sample.full_length > len(sample.ids)
        self.tokens += len(sample.ids)
        self.trained_tokens += sample.trained_tokens
        return True

    def facts(self) -> DatasetFacts:
        return DatasetFacts(
            rows=self.rows,
            used=self.used,
            left_out=dict(self.left_out),
            truncated=self.truncated,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
        )


def _shown(rows: Iterable[Row], template: str | None, special: Mapping[str, str], tally: _Tally) -> Iterator[_Shown]:
    """Rows as text, with the spans that are trained; rows that the template cannot show are left out and counted."""
    prints_calls = template is not None and prints_tool_calls(template, special=special)
    for row in rows:
        tally.rows += 1
        if not row.messages:
            yield _Shown(row, row.text, [(0, len(row.text))])
            continue
        if template is None:
            raise SourceInvalid(
                f"{row.place}: the row is a chat, but the source has no chat template; "
                "use rows with text, or a source with chat_template.jinja"
            )
        if not any(message["role"] == "assistant" for message in row.messages):
            tally.left_out[NO_ASSISTANT_MESSAGE] += 1
        elif not prints_calls and any("tool_calls" in message for message in row.messages):
            # The call would be missing from the text, and an empty turn would be learnt in its place.
            tally.left_out[CANNOT_PRINT_TOOL_CALLS] += 1
        else:
            try:
                text, spans = assistant_spans(template, row.messages, special=special, today=RENDERED_ON)
            except DatasetInvalid as error:
                raise DatasetInvalid(f"{row.place}: {error}") from error
            yield _Shown(row, text, spans)


def _sample(shown: _Shown, ids: Sequence[int], starts: Sequence[int], max_length: int) -> Sample:
    """Cut to `max_length`; a token is trained when it begins inside a span."""
    trained = [False] * min(len(ids), max_length)
    spans = iter(shown.spans)
    span = next(spans, None)
    for index in range(len(trained)):
        while span is not None and starts[index] >= span[1]:
            span = next(spans, None)
        if span is None:
            break
        trained[index] = index > 0 and starts[index] >= span[0]
    return Sample(
        ids=ids[:max_length],
        trained=trained,
        digest=shown.row.digest,
        place=shown.row.place,
        full_length=len(ids),
    )


def _nothing_left(files: Sequence[Path], tally: _Tally, max_length: int, limit_name: str) -> DatasetInvalid:
    names = ", ".join(path.name for path in files) or "no file"
    if not tally.rows:
        return DatasetInvalid(f"{names}: the data set is empty; give it rows")
    causes = "; ".join(f"{count} rows: {cause}" for cause, count in sorted(tally.left_out.items()))
    if tally.left_out[tally.beyond_limit]:
        advice = f"nothing is left within {limit_name}: {max_length}; all of it fits with {limit_name}: {tally.longest}"
    else:
        advice = "use rows with an assistant message that the source's chat template can print"
    return DatasetInvalid(f"{names}: none of {tally.rows} rows has a token to learn ({causes}); {advice}")
