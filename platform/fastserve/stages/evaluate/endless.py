"""Answers that never come to an end: what averages over tokens cannot see.

A candidate can be closer to its parent than any other on average and still turn one common question into the same
phrase over and over. Divergence on given tokens does not show it, since the given tokens lead back out of the circle at
every step; only an answer that the model writes by itself does. Answers that the parent does not end either say nothing
of the candidate, so only those that the parent ends by itself count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.plan.gate import Interval
from fastserve.stages.evaluate.intervals import wilson

ANSWER_TOKENS = 48
"""Tokens of an answer that are looked at."""

LONGEST_PHRASE = 16
"""Tokens of the longest phrase that counts as repeated."""

REPEATS = 3
FEWEST_TOKENS = 18
"""A circle has at least `REPEATS` turns and covers at least so many tokens: a word said twice is no circle."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote by itself."""

    ids: Sequence[int]
    """Token ids, stop tokens left out or not."""

    text: str
    ended: bool
    """True: the model wrote a stop token; False: it was cut off."""


def runs_in_circles(ids: Sequence[int]) -> bool:
    """Whether `ids` ends in one phrase again and again."""
    for phrase in range(1, LONGEST_PHRASE + 1):
        same = 0
        while same + phrase < len(ids) and ids[-1 - same] == ids[-1 - same - phrase]:
            same += 1
        if same + phrase >= max(REPEATS * phrase, FEWEST_TOKENS):
            return True
    return False


def is_endless(answer: Answer) -> bool:
    """Whether the answer was cut off while it ran in circles."""
    return not answer.ended and runs_in_circles(answer.ids)


def endless_share(parent: Sequence[Answer], candidate: Sequence[Answer]) -> Interval | None:
    """Share of the answers which the parent ends that are endless with the candidate; None when the parent ends none.

    parent, candidate: answers to the same prompts, in the same order.
    """
    theirs = [answer for mine, answer in zip(parent, candidate, strict=True) if mine.ended]
    return wilson(sum(map(is_endless, theirs)), len(theirs)) if theirs else None
