"""The rows that figures are measured on: held out, in the chat template, and only the assistant's tokens count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.data.samples import samples

BEYOND_MAX_ROWS = "beyond maxRows"


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One row as tokens."""

    ids: Sequence[int]
    """Token ids of the whole row, shape [tokens]."""

    positions: Sequence[int]
    """Places of the tokens that count: those that the assistant wrote, its end token among them."""

    digest: str
    place: str
    """`file:line`."""

    @property
    def prompt(self) -> Sequence[int]:
        """Tokens before the first that counts; at least one."""
        return self.ids[: self.positions[0]]

    @property
    def has_prompt(self) -> bool:
        """Whether there is something to answer: plain text counts from its second token on."""
        return self.positions[0] > 1


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The rows that are used, and how many others there were."""

    rows: Sequence[HeldOutRow]
    excluded: Mapping[str, int]
    """Rows that are not used, by cause."""

    truncated: int
    """Used rows that were cut at `context`."""

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(len(row.positions) for row in self.rows)

    @property
    def distinct_rows(self) -> int:
        """Rows that say different things."""
        return len({row.digest for row in self.rows})


def held_out(data: Path, files: TokenizerFiles, context: int, max_rows: int) -> HeldOut:
    """At most `max_rows` rows of `data`, evenly apart, each cut at `context` tokens.

    A row without an assistant token within `context` is left out and counted. Raises DatasetInvalid when none is left.
    """
    found = samples(
        [data], files.tokenizer(), files.chat_template, context, special=files.special, limit_name="context"
    )
    usable = found.samples
    # Evenly apart and not the first ones: files are often sorted by topic.
    chosen = range(len(usable)) if len(usable) <= max_rows else [n * len(usable) // max_rows for n in range(max_rows)]
    excluded = dict(found.facts.left_out)
    if len(usable) > max_rows:
        excluded[BEYOND_MAX_ROWS] = len(usable) - max_rows
    rows = [
        HeldOutRow(
            ids=usable[index].ids,
            positions=[place for place, counts in enumerate(usable[index].trained) if counts],
            digest=usable[index].digest,
            place=usable[index].place,
        )
        for index in chosen
    ]
    return HeldOut(rows=rows, excluded=excluded, truncated=found.facts.truncated)
