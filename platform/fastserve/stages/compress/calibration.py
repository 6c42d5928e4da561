"""The rows that quantisation measures on, as the model will see them: in its own chat template.

Activations of plain text are not those of a conversation: text has neither the template's special tokens nor its
turns, and they are where the largest activations are.
"""

from __future__ import annotations

from pathlib import Path

from fastserve.artifacts.tokenizer import from_folder
from fastserve.data.samples import samples


def calibration_rows(model: Path, data: Path, rows: int, max_length: int) -> list[list[int]]:
    """At most `rows` rows of `data` as token ids, each at most `max_length` long, spread evenly over the data set.

    model: Hugging Face folder whose tokenizer and chat template are used.
    Raises DatasetInvalid for rows that cannot be read, and when none is left.
    """
    files = from_folder(model)
    found = samples([data], files.tokenizer(), files.chat_template, max_length, special=files.special).samples
    return [list(found[index].ids) for index in spread(len(found), rows)]


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` indexes below `count`, rising and evenly apart: files are often sorted by topic."""
    if count <= wanted:
        return list(range(count))
    return [index * count // wanted for index in range(wanted)]
