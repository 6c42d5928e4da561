"""The evaluate stage: the same rows through source, parent and candidate, on the engine that will serve.

Nothing is judged here. The stage measures, with intervals; `plan.gate` decides, as often as its limits change, without
measuring again. What is measured is named by digest: only an artifact with the candidate's digest may be served on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.artifacts.tokenizer import from_folder
from fastserve.spec.evaluate import Evaluate
from fastserve.stages.evaluate import speed
from fastserve.stages.evaluate.endless import ANSWER_TOKENS, Answer
from fastserve.stages.evaluate.engine import Engine
from fastserve.stages.evaluate.held_out import HeldOut, held_out
from fastserve.stages.evaluate.report import Figures, metrics_of, row_lines, write_lines
from fastserve.stages.evaluate.tasks import TaskRows, questions, task_lines, task_metrics, task_report
from fastserve.stages.work import Outcome, Work

CHUNK_ROWS = 32
"""Rows between two reports of progress."""


def run(work: Work) -> Outcome:
    """Measure `spec.evaluate` on the candidate, on its parent and on the source.

    Returns a folder with `report.json` (everything), `rows.jsonl` (figures by row, no text) and, for every task,
    `tasks/<name>.jsonl` (prediction and reference).

    Raises DatasetInvalid for rows that cannot be read or when none is left, EngineFailed when a model does not load.
    """
    evaluate = Evaluate.model_validate(work.request.section)
    folder = work.scratch / "artifact"
    (folder / "tasks").mkdir(parents=True)
    measured = _Measurement(work, evaluate)
    measured.run()
    tasks = {name: measured.task_metrics(name) for name in measured.asked}
    metrics = metrics_of(measured.figures, tasks)
    for name, rows in measured.asked.items():
        write_lines(
            folder / "tasks" / f"{name}.jsonl",
            task_lines(rows, measured.answers["candidate", name], measured.answers.get(("parent", name))),
        )
    write_lines(folder / "rows.jsonl", row_lines(measured.figures))
    report = {
        **metrics,
        "tasks": {name: task_report(task, name) for name, task in tasks.items()},
        "truncatedRows": measured.figures.rows.truncated,
        "rounds": measured.figures.speeds_to_json(),
        "seconds": {phase: round(seconds, 1) for phase, seconds in measured.seconds.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Outcome(folder, metrics)


@dataclass(slots=True)
class _Measurement:
    """One run of the stage: what was asked of which model, and how long each phase took."""

    work: Work
    evaluate: Evaluate
    figures: Figures = field(init=False)
    asked: dict[str, TaskRows] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Predictions by role and task."""

    seconds: dict[str, float] = field(default_factory=dict)
    _context: int = 0
    _done: int = 0
    _total: int = 1

    def run(self) -> None:
        """Measure everything."""
        with self._phase("rows"):
            folders = self._prepare()
        if "source" in folders:
            with self._engine("source", folders["source"]) as engine:
                self._score("source", engine)
        with ExitStack() as loaded:
            engines: dict[str, Engine] = {}
            for role in ("parent", "candidate"):
                if role in folders:
                    engines[role] = loaded.enter_context(self._engine(role, folders[role]))
                    self._score(role, engines[role])
                    self._ask(role, engines[role])
                    if "parent" in folders:
                        self._let_answer(role, engines[role])
            with self._phase("speed"):
                self._time(engines)

    def task_metrics(self, name: str) -> dict[str, Any]:
        """Scores of a task; a candidate that is its own parent is compared with itself."""
        candidate = self.answers["candidate", name]
        return task_metrics(self.asked[name], candidate, self.answers.get(("parent", name)))

    def _prepare(self) -> dict[str, Path]:
        """Folders of the models that are loaded, by role; a role with the candidate's own bytes is not loaded again."""
        work, evaluate = self.work, self.evaluate
        work.report.update(0, 1, "rows", note="reading rows")
        records = {
            role: work.input_record(role) for role in ("source", "parent", "candidate") if role in work.request.inputs
        }
        digests = {role: record.digest for role, record in records.items()}
        folders = {
            role: work.input(role) / "model"
            for role, digest in digests.items()
            if role == "candidate" or digest != digests["candidate"]
        }
        files = from_folder(folders["candidate"])
        longest = _longest(folders["candidate"], evaluate)
        rows = held_out(work.data(evaluate.data), files, min(evaluate.context, longest - 1), evaluate.max_rows)
        for task in evaluate.tasks:
            self.asked[task.name] = questions(work.data(task.data), files, longest, task.max_tokens)
        self._context = longest
        self.figures = Figures(rows=rows, digests=digests, folders=folders)
        asked = sum(len(task.questions) for task in self.asked.values()) * len(folders.keys() & {"parent", "candidate"})
        rounds = 2 * (speed.ROUNDS + 1) if "parent" in folders else speed.ROUNDS + 1
        free = 2 * len(rows.rows) if "parent" in folders else 0
        self._total = len(rows.rows) * len(folders) + asked + free + rounds * speed.STREAMS
        return folders

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began_at = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began_at

    @contextmanager
    def _engine(self, role: str, folder: Path) -> Iterator[Engine]:
        self._report(0, f"loading the {role}")
        with self._phase("load"):
            engine = Engine(folder, self._context)
        with engine:
            yield engine

    def _score(self, role: str, engine: Engine) -> None:
        rows = self.figures.rows.rows
        with self._phase("score"):
            scores = []
            for begin in range(0, len(rows), CHUNK_ROWS):
                chunk = rows[begin : begin + CHUNK_ROWS]
                scores.extend(engine.score([row.ids for row in chunk], [row.positions for row in chunk]))
                self._report(len(chunk), f"scoring the {role}")
        self.figures.scores[role] = scores

    def _ask(self, role: str, engine: Engine) -> None:
        limits = {task.name: task.max_tokens for task in self.evaluate.tasks}
        for name, task in self.asked.items():
            with self._phase("tasks"):
                found: list[str] = []
                for begin in range(0, len(task.questions), CHUNK_ROWS):
                    chunk = task.questions[begin : begin + CHUNK_ROWS]
                    answers = engine.answer([question.prompt for question in chunk], limits[name])
                    found.extend(answer.text for answer in answers)
                    self._report(len(chunk), f"task {name} on the {role}")
            self.answers[role, name] = found

    def _let_answer(self, role: str, engine: Engine) -> None:
        """Free answers to the held-out prompts; the candidate is asked only what the parent came to an end with."""
        asked = [index for index, row in enumerate(self.figures.rows.rows) if row.has_prompt]
        if role == "candidate":
            asked = [index for index in asked if self.figures.free["parent"][index].ended]
        answers: dict[int, Answer] = {}
        with self._phase("answers"):
            for begin in range(0, len(asked), CHUNK_ROWS):
                chunk = asked[begin : begin + CHUNK_ROWS]
                prompts = [self.figures.rows.rows[index].prompt[-(self._context - ANSWER_TOKENS) :] for index in chunk]
                answers.update(zip(chunk, engine.answer(prompts, ANSWER_TOKENS), strict=True))
                self._report(len(chunk), f"the {role} answers")
        self._report(len(self.figures.rows.rows) - len(asked), f"the {role} has answered")
        self.figures.free[role] = answers

    def _time(self, engines: Mapping[str, Engine]) -> None:
        prompts = _prompts(self.figures.rows, self._context - speed.TOKENS)
        rounds = {
            role: lambda engine=engine: engine.timed_round(prompts, speed.TOKENS).tokens_per_second
            for role, engine in engines.items()
        }

        def done() -> None:
            self._report(speed.STREAMS, "measuring speed, parent and candidate in turn")

        if "parent" in rounds:
            self.figures.speeds = speed.interleaved(rounds["parent"], rounds["candidate"], done=done)
        else:
            self.figures.candidate_speed = speed.alone(rounds["candidate"], speed.ROUNDS, done=done)

    def _report(self, rows: int, note: str) -> None:
        self._done += rows
        self.work.report.update(self._done, self._total, "rows", note=note)


def _longest(model: Path, evaluate: Evaluate) -> int:
    """Tokens that the engine must hold of one row: a held-out row and one more, or a prompt and its answer."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    most = int(config.get("max_position_embeddings") or 2**31)
    return min(
        most, evaluate.context + max([speed.TOKENS, ANSWER_TOKENS, *(task.max_tokens for task in evaluate.tasks)])
    )


def _prompts(rows: HeldOut, room: int) -> list[Sequence[int]]:
    """`STREAMS` prompts of real rows, each at most `room` tokens, the same for every round and model."""
    found = [row.prompt[-room:] for row in rows.rows]
    return [found[index % len(found)] for index in range(speed.STREAMS)]
