"""Exact match after one documented normalisation: a blank at a line's end does not decide which model is better."""

from __future__ import annotations

import unicodedata

WORDS = (
    "Prediction and reference are equal after: Unicode NFC; ends stripped of every Unicode blank (tabs, CR, LF and "
    "no-break spaces included); inner runs of blanks as one space. Case and punctuation are kept."
)
"""The normalisation in words; every report prints it."""


def normalise(text: str) -> str:
    """`text` as it is compared. Applying it twice equals once."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def matches(prediction: str, reference: str) -> bool:
    """Whether both are the same after `normalise`."""
    return normalise(prediction) == normalise(reference)
