"""From rows to samples: token ids, and which of them the model learns to write.

A sample is a pure function of its row, the tokenizer, the template and the length limit, so that a run that begins anew
on other workers sees the same tokens in the same order. Whether a row has something to learn is asked after it was cut,
never before: a long question with its answer beyond the limit teaches nothing and must not count.

Text files have no rows: they are cut into consecutive samples of the limit's length, and nothing of them is lost.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastserve.data.rows import Row, data_files, read_rows
from fastserve.data.running_text import is_running_text, text_blocks
from fastserve.data.template import Span, assistant_spans, prints_tool_calls
from fastserve.errors import DatasetInvalid, SourceInvalid
from fastserve.plan.facts import DatasetFacts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OverLength = Literal["truncate", "drop"]

CANNOT_PRINT_TOOL_CALLS = "the chat template cannot print tool calls"
NO_ASSISTANT_MESSAGE = "no assistant message"
ONE_TOKEN = "a single token, which nothing precedes"

RENDERED_ON = date(2026, 1, 1)
"""The day that is shown by templates which print one: the same rows give the same samples on any day."""

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 512 * 1024
_BATCH_BLOCKS = 8
"""What the tokenizer gets at once: enough for its threads, little enough for memory."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a model is shown of one row, or of one piece of a text file."""

    ids: Sequence[int]
    """Token ids, shape [tokens]."""

    trained: Sequence[bool]
    """Whether the loss of predicting each token counts, shape [tokens]; never the first, which nothing precedes."""

    digest: str
    """Digest of what it says, the same whichever file it came from; empty where nobody asked for it."""

    place: str
    """`file:line` of the row, or `file:piece` of a text file, counted from 1."""

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
    spans: Sequence[Span] | None
    """What of the text is trained; None for all of it."""


def samples(
    paths: Iterable[Path],
    tokenizer: Tokenizer,
    template: str | None,
    max_length: int,
    *,
    special: Mapping[str, str] | None = None,
    limit_name: str = "maxLength",
    over_length: OverLength = "truncate",
) -> SampleSet:
    """All of a SampleStream at once, for sets that are small or measured whole; its words and errors are the same."""
    stream = SampleStream(
        paths,
        tokenizer,
        template,
        max_length,
        special=special,
        limit_name=limit_name,
        over_length=over_length,
    )
    return SampleSet(samples=list(stream), facts=stream.facts)


def dataset_facts(
    paths: Iterable[Path],
    tokenizer: Tokenizer,
    template: str | None,
    max_length: int,
    *,
    special: Mapping[str, str] | None = None,
    limit_name: str = "maxLength",
    over_length: OverLength = "truncate",
) -> DatasetFacts:
    """Facts of a SampleStream; its samples are counted and dropped, so memory stays flat."""
    stream = SampleStream(
        paths,
        tokenizer,
        template,
        max_length,
        special=special,
        limit_name=limit_name,
        over_length=over_length,
        digests=False,
    )
    for _ in stream:
        pass
    return stream.facts


class SampleStream:
    """Samples of everything in `paths` that has something to learn, one after the other; facts once it has ended.

    paths: files, or folders whose files are read in the order of their names.
    tokenizer: of the model that is trained.
    template: Jinja source of its chat template; None for a model without one, which learns from text only.
    max_length: most tokens of a sample.
    special: texts of special tokens by their usual names, such as `bos_token`.
    limit_name: what the manifest calls `max_length` where this set is named.
    over_length: whether a longer row is cut (truncate) or left out (drop); either is counted. Text files are always cut
        into consecutive samples.
    digests: whether samples get their digest, which costs about as much as tokenising them.

    Iterating raises DatasetInvalid with file and line for a row that cannot be read, and at the end when no row is left
    that teaches anything; SourceInvalid when chat rows meet a model without a template.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        tokenizer: Tokenizer,
        template: str | None,
        max_length: int,
        *,
        special: Mapping[str, str] | None = None,
        limit_name: str = "maxLength",
        over_length: OverLength = "truncate",
        digests: bool = True,
    ) -> None:
        self._paths = [Path(path) for path in paths]
        self._tokenizer, self._template, self._special = tokenizer, template, special or {}
        self._max_length, self._limit_name, self._over_length = max_length, limit_name, over_length
        self._digests = digests
        # Some tokenizer.json files say to cut or fill up by themselves; the cut here is one that is counted.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tally = _Tally(
            beyond_limit=f"no assistant token within {limit_name}", over_limit=f"longer than {limit_name}"
        )

    @property
    def facts(self) -> DatasetFacts:
        """What was seen so far."""
        return self._tally.facts()

    def __iter__(self) -> Iterator[Sample]:
        for path in self._paths:
            for file in data_files(path):
                yield from self._pieces(file) if is_running_text(file) else self._rows(file)
        if not self._tally.used:
            raise _nothing_left(self._paths, self._tally, self._max_length, self._limit_name)

    def _rows(self, file: Path) -> Iterator[Sample]:
        shown = _shown(read_rows(file), self._template, self._special, self._tally)
        for batch in _batches(shown):
            # Offsets are needed only to find the spans, and finding none is quicker.
            whole = [item.text for item in batch if item.spans is None]
            parted = [item.text for item in batch if item.spans is not None]
            texts = iter(self._tokenizer.encode_batch_fast(whole, add_special_tokens=False) if whole else ())
            chats = iter(self._tokenizer.encode_batch(parted, add_special_tokens=False) if parted else ())
            for item in batch:
                encoding: Any = next(texts) if item.spans is None else next(chats)
                sample = self._sample(item, encoding)
                if self._tally.take(sample, self._left_out_because(item, sample)):
                    yield sample

    def _sample(self, item: _Shown, encoding: Any) -> Sample:
        ids: list[int] = encoding.ids
        kept = ids[: self._max_length]
        if item.spans is None:
            trained = [False, *[True] * (len(kept) - 1)] if kept else []
        else:
            trained = _inside(item.spans, [start for start, _ in encoding.offsets], len(kept))
        return Sample(kept, trained, item.row.digest if self._digests else "", item.row.place, len(ids))

    def _left_out_because(self, item: _Shown, sample: Sample) -> str | None:
        if self._over_length == "drop" and sample.full_length > self._max_length:
            return self._tally.over_limit
        if any(sample.trained):
            return None
        return ONE_TOKEN if item.spans is None and self._max_length > 1 else self._tally.beyond_limit

    def _pieces(self, file: Path) -> Iterator[Sample]:
        """Consecutive samples of a text file; only the last one may be shorter."""
        number, held = 0, array("i")
        blocks = text_blocks(file)
        while batch := list(islice(blocks, _BATCH_BLOCKS)):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                held.extend(encoding.ids)
            begin = 0
            while len(held) - begin >= self._max_length:
                number += 1
                yield from self._piece(file, number, held[begin : begin + self._max_length])
                begin += self._max_length
            del held[:begin]
        if held:
            yield from self._piece(file, number + 1, held)

    def _piece(self, file: Path, number: int, ids: array[int]) -> Iterator[Sample]:
        self._tally.rows += 1
        digest = hashlib.sha256(ids.tobytes()).hexdigest() if self._digests else ""
        trained = [False, *[True] * (len(ids) - 1)]
        sample = Sample(ids.tolist(), trained, digest, f"{file.name}:{number}", len(ids))
        if self._tally.take(sample, ONE_TOKEN if len(ids) == 1 else None):
            yield sample


@dataclass(slots=True)
class _Tally:
    beyond_limit: str
    over_limit: str
    rows: int = 0
    used: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def take(self, sample: Sample, left_out_because: str | None) -> bool:
        """Count a sample; False when it is left out."""
        self.longest = max(self.longest, sample.full_length)
        if left_out_because is not None:
            self.left_out[left_out_because] += 1
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


def _batches(shown: Iterable[_Shown]) -> Iterator[list[_Shown]]:
    batch: list[_Shown] = []
    characters = 0
    for item in shown:
        batch.append(item)
        characters += len(item.text)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shown(rows: Iterable[Row], template: str | None, special: Mapping[str, str], tally: _Tally) -> Iterator[_Shown]:
    """Rows as text, with the spans that are trained; rows that the template cannot show are left out and counted."""
    prints_calls = template is not None and prints_tool_calls(template, special=special)
    for row in rows:
        tally.rows += 1
        if not row.messages:
            yield _Shown(row, row.text, None)
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


def _inside(spans: Sequence[Span], starts: Sequence[int], length: int) -> list[bool]:
    """Which of the first `length` tokens are trained: those that begin inside a span, and not the very first.

    starts: first character of each token, rising, shape [tokens before the cut].
    """
    trained = [False] * length
    for first, last in spans:
        begin = max(1, bisect_left(starts, first, 0, length))
        end = bisect_left(starts, last, 0, length)
        if begin < end:
            trained[begin:end] = [True] * (end - begin)
    return trained


def _nothing_left(files: Sequence[Path], tally: _Tally, max_length: int, limit_name: str) -> DatasetInvalid:
    names = ", ".join(path.name for path in files) or "no file"
    if not tally.rows:
        return DatasetInvalid(f"{names}: the data set is empty; give it rows")
    causes = "; ".join(f"{count} rows: {cause}" for cause, count in sorted(tally.left_out.items()))
    if tally.left_out[tally.beyond_limit] or tally.left_out[tally.over_limit]:
        advice = f"nothing is left within {limit_name}: {max_length}; all of it fits with {limit_name}: {tally.longest}"
    else:
        advice = "use rows with an assistant message that the source's chat template can print"
    return DatasetInvalid(f"{names}: none of {tally.rows} rows has a token to learn ({causes}); {advice}")
