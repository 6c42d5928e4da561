"""Tasks with a score: the model answers, and its answer is compared with the row's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.data.rows import read_rows
from fastserve.data.samples import RENDERED_ON
from fastserve.data.template import render
from fastserve.errors import DatasetInvalid
from fastserve.stages.evaluate.exact_match import WORDS, matches
from fastserve.stages.evaluate.intervals import paired_drop, wilson

BEYOND_CONTEXT = "prompt and answer beyond context"


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a task."""

    prompt: Sequence[int]
    """Token ids of all turns before the last, with the opening of an assistant turn."""

    reference: str
    """The last turn's text."""

    digest: str
    place: str
    """`file:line`."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of a task that are used, and how many others there were, by cause."""

    questions: Sequence[Question]
    excluded: Mapping[str, int]

    @property
    def distinct_rows(self) -> int:
        """Rows that say different things."""
        return len({question.digest for question in self.questions})


def questions(data: Path, files: TokenizerFiles, context: int, max_tokens: int) -> TaskRows:
    """Rows of `data` as questions; a row whose prompt leaves no room for `max_tokens` in `context` is left out.

    Raises DatasetInvalid for a row that does not end with an assistant turn, and when no row is left.
    """
    tokenizer = files.tokenizer()
    kept: list[Question] = []
    excluded: Counter[str] = Counter()
    for row in read_rows(data):
        if not row.messages or row.messages[-1]["role"] != "assistant" or len(row.messages) < 2:
            raise DatasetInvalid(f"{row.place}: the row does not end with an assistant turn; add the reference answer")
        text = render(
            files.chat_template or _no_template(row.place),
            row.messages[:-1],
            add_generation_prompt=True,
            special=files.special,
            today=RENDERED_ON,
        )
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        if len(prompt) + max_tokens > context:
            excluded[BEYOND_CONTEXT] += 1
        else:
            kept.append(Question(prompt, row.messages[-1]["content"], row.digest, row.place))
    if not kept:
        causes = f" (left out: {dict(excluded)}; raise evaluate.context)" if excluded else "; give it rows"
        raise DatasetInvalid(f"{data.name}: the task has no row that can be asked{causes}")
    return TaskRows(kept, dict(excluded))


def _no_template(place: str) -> str:
    raise DatasetInvalid(f"{place}: the model has no chat template, so it cannot be asked; remove evaluate.tasks")


def task_metrics(rows: TaskRows, candidate: Sequence[str], parent: Sequence[str] | None) -> dict[str, Any]:
    """Scores of a task with their intervals.

    candidate, parent: predictions in the order of the rows; parent is None when there is nothing to compare with.
    """
    hits = _hits(rows, candidate)
    metrics: dict[str, Any] = {
        "metric": "exactMatch",
        "rows": len(hits),
        "distinctRows": rows.distinct_rows,
        "candidate": wilson(sum(hits), len(hits)).to_json(),
        "excludedRows": dict(rows.excluded),
    }
    if parent is not None:
        parent_hits = _hits(rows, parent)
        metrics["parent"] = wilson(sum(parent_hits), len(parent_hits)).to_json()
        metrics["drop"] = paired_drop(parent_hits, hits).to_json()
    return metrics


def task_lines(rows: TaskRows, candidate: Sequence[str], parent: Sequence[str] | None) -> list[dict[str, Any]]:
    """One line a row for `tasks/<name>.jsonl`: where it stands, both texts as they are, and whether they match."""
    lines: list[dict[str, Any]] = []
    for index, question in enumerate(rows.questions):
        line = {
            "row": question.place,
            "reference": question.reference,
            "prediction": candidate[index],
            "match": matches(candidate[index], question.reference),
        }
        if parent is not None:
            line["parentPrediction"] = parent[index]
            line["parentMatch"] = matches(parent[index], question.reference)
        lines.append(line)
    return lines


def task_report(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What report.json says of a task: its figures, how texts were compared, and where both texts stand."""
    return {**metrics, "normalisation": WORDS, "lines": f"tasks/{name}.jsonl"}


def _hits(rows: TaskRows, predictions: Sequence[str]) -> list[bool]:
    return [
        matches(prediction, question.reference)
        for prediction, question in zip(predictions, rows.questions, strict=True)
    ]
