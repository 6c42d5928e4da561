"""How far apart two models are on the same tokens: pure arithmetic, no engine.

An engine hands out only the most likely tokens of each position, so distributions are compared on what is known of
both, with everything else in one remainder. Merging outcomes never makes a divergence larger (data-processing
inequality; Cover and Thomas, Elements of Information Theory, 2.8), so the figure is a lower bound of the true one, and
close to it when the known tokens carry nearly all the mass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_SHARE = 1e-9
"""Probability that a remainder is given at least: the tokens outside both lists are never impossible."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """What a model says of the tokens of one row that count, each given the tokens before it."""

    top_ids: NDArray[np.int32]
    """Token ids, shape [tokens, known]: the row's own token, then the most likely ones."""

    top_logprobs: NDArray[np.float64]
    """Their natural log probabilities, same shape."""

    @property
    def negative_log_likelihood(self) -> float:
        """Of the row's own tokens, summed, in nats."""
        return -float(self.top_logprobs[:, 0].sum())

    def known(self) -> Iterator[dict[int, float]]:
        """Log probability by token id, one value a token of the row."""
        for ids, logprobs in zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True):
            yield dict(zip(ids, logprobs, strict=True))


def compare(parent: RowScore, candidate: RowScore) -> tuple[float, int]:
    """Sum of divergences in nats, and number of flipped greedy tokens, over the tokens of a row."""
    pairs = list(zip(parent.known(), candidate.known(), strict=True))
    return sum(kl_divergence(mine, theirs) for mine, theirs in pairs), sum(
        flipped(mine, theirs) for mine, theirs in pairs
    )


def kl_divergence(parent: Mapping[int, float], candidate: Mapping[int, float]) -> float:
    """KL(parent || candidate) in nats, from the log probabilities that are known of both.

    parent, candidate: log probability by token id, each part of a distribution.
    Never negative; 0 when both say the same.
    """
    known = sorted(parent.keys() & candidate.keys())
    mine = [math.exp(parent[token]) for token in known]
    theirs = [math.exp(candidate[token]) for token in known]
    total = sum(p * (parent[token] - candidate[token]) for p, token in zip(mine, known, strict=True) if p > 0)
    rest, other_rest = max(1 - sum(mine), SMALLEST_SHARE), max(1 - sum(theirs), SMALLEST_SHARE)
    return max(0.0, total + rest * math.log(rest / other_rest))


def flipped(parent: Mapping[int, float], candidate: Mapping[int, float]) -> bool:
    """Whether greedy decoding writes another token: no token is the most likely one of both.

    Equal tops are one top each (bf16 makes ties common), so a tie that falls the other way is no flip.
    """
    return not (_tops(parent) & _tops(candidate))


def _tops(known: Mapping[int, float]) -> set[int]:
    best = max(known.values())
    return {token for token, logprob in known.items() if logprob == best}
