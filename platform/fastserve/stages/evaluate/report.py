"""From scores to the figures of the record and the lines of rows.jsonl: arithmetic and files, no engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fastserve.stages.evaluate.divergence import RowScore, compare
from fastserve.stages.evaluate.endless import Answer, endless_share, is_endless
from fastserve.stages.evaluate.held_out import HeldOut
from fastserve.stages.evaluate.intervals import bootstrap
from fastserve.stages.evaluate.speed import Speeds


@dataclass(slots=True)
class Figures:
    """What was measured, before it is summed up."""

    rows: HeldOut
    digests: Mapping[str, str]
    """Digest of the artifact in each role."""

    folders: Mapping[str, Path]
    """Model folder of each role that was loaded."""

    scores: dict[str, list[RowScore]] = field(default_factory=dict)
    """By role, one a row."""

    free: dict[str, dict[int, Answer]] = field(default_factory=dict)
    """Free answers by role and index of the row: the parent's to all, the candidate's to what the parent ended."""

    speeds: Speeds | None = None
    """None: there is no parent to compare with."""

    candidate_speed: float | None = None
    """Tokens a second, where there are no `speeds`."""

    def tokens_per_second(self, role: str) -> float | None:
        """Median over the rounds; None for the source, which runs in no round."""
        if self.speeds is None:
            return self.candidate_speed if role == "candidate" else None
        rounds = {"parent": self.speeds.parent, "candidate": self.speeds.candidate}.get(role)
        return None if rounds is None else median(rounds)

    def speeds_to_json(self) -> dict[str, list[float]] | None:
        """Tokens a second by round."""
        if self.speeds is None:
            return None
        return {
            "parent": [round(speed, 1) for speed in self.speeds.parent],
            "candidate": [round(speed, 1) for speed in self.speeds.candidate],
        }


def metrics_of(figures: Figures, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The record's metrics; intervals are {value, low, high}, 95 %.

    A candidate that is its own parent has no comparison: its figures stand in both roles.
    """
    models = {role: _model(figures, role) for role in figures.folders}
    for role, digest in figures.digests.items():
        if role not in models and digest == figures.digests["candidate"]:
            models[role] = models["candidate"]
    metrics = {
        "rows": len(figures.rows.rows),
        "distinctRows": figures.rows.distinct_rows,
        "tokens": figures.rows.tokens,
        "models": {role: models[role] for role in ("source", "parent", "candidate") if role in models},
        "excludedRows": dict(figures.rows.excluded),
        "tasks": dict(tasks),
    }
    if "parent" in figures.scores:
        metrics |= _comparison(figures)
    return metrics


def row_lines(figures: Figures) -> list[dict[str, Any]]:
    """One line a row: where it stands, its tokens, and its figures by role."""
    lines = []
    for index, row in enumerate(figures.rows.rows):
        line: dict[str, Any] = {"row": row.place, "digest": row.digest, "tokens": len(row.positions)}
        line["nll"] = {role: round(scores[index].negative_log_likelihood, 6) for role, scores in figures.scores.items()}
        if "parent" in figures.scores:
            divergence, flips = compare(figures.scores["parent"][index], figures.scores["candidate"][index])
            line |= {"klDivergence": round(divergence, 6), "flippedTokens": flips}
        if index in figures.free.get("candidate", {}):
            line["endless"] = is_endless(figures.free["candidate"][index])
        lines.append(line)
    return lines


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON, one value a line."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")


def _model(figures: Figures, role: str) -> dict[str, Any]:
    likelihood = sum(score.negative_log_likelihood for score in figures.scores[role])
    model = {
        "digest": figures.digests[role],
        "sizeBytes": sum(file.stat().st_size for file in figures.folders[role].glob("*.safetensors")),
        "perplexity": math.exp(likelihood / figures.rows.tokens),
    }
    speed = figures.tokens_per_second(role)
    return model if speed is None else {**model, "tokensPerSecond": speed}


def _comparison(figures: Figures) -> dict[str, Any]:
    parent, candidate = figures.scores["parent"], figures.scores["candidate"]
    tokens = [float(len(row.positions)) for row in figures.rows.rows]
    compared = [compare(mine, theirs) for mine, theirs in zip(parent, candidate, strict=True)]
    excess = [
        theirs.negative_log_likelihood - mine.negative_log_likelihood
        for mine, theirs in zip(parent, candidate, strict=True)
    ]
    found = {
        "perplexityIncrease": bootstrap([excess, tokens], lambda sums: np.expm1(sums[:, 0] / sums[:, 1])),
        "klDivergence": bootstrap([[kl for kl, _ in compared], tokens], lambda sums: sums[:, 0] / sums[:, 1]),
        "flippedTokens": bootstrap([[flips for _, flips in compared], tokens], lambda sums: sums[:, 0] / sums[:, 1]),
    }
    if figures.speeds is not None:
        found["speedup"] = figures.speeds.speedup
    asked = sorted(figures.free.get("candidate", {}))
    endless = endless_share(
        [figures.free["parent"][index] for index in asked], [figures.free["candidate"][index] for index in asked]
    )
    if endless is not None:
        found["endlessAnswers"] = endless
    return {name: interval.to_json() for name, interval in found.items()} | {"endedAnswers": len(asked)}
