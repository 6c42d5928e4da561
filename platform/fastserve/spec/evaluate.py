"""The evaluate stage and the gate that decides whether a candidate may take traffic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fastserve.spec.section import Name, Number, Positive, Section, Share, wrong_at
from fastserve.spec.source import SourceRef

TASK_KEY = "task."
"""How a gate's key begins that limits a task."""


class Task(Section):
    """A task that the model must still do: rows whose last assistant turn is the reference."""

    name: Name
    """Name of the task; the gate refers to it as `task.<name>`."""

    data: SourceRef
    """Rows as in train.dataset; the last assistant turn is the reference."""

    metric: Literal["exactMatch"] = "exactMatch"
    """exactMatch: equal after Unicode NFC, ends stripped, runs of blanks as one; case and punctuation kept."""

    max_tokens: Positive = 64
    """Longest answer that is generated."""


class TaskLimit(Section):
    """What a task's score must keep."""

    min: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Lowest score of the candidate."""

    max_drop: Annotated[Share, Field(le=1)] | None = None
    """Most that the score may fall below the parent's."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.min is None and self.max_drop is None:
            raise ValueError("limits nothing; give min or maxDrop")
        return self


def _task_keys_in_schema(schema: dict[str, Any]) -> None:
    """In the manifest tasks stand beside the other limits, as `task.<name>`; the schema says so too."""
    tasks = schema["properties"].pop("tasks")
    schema["patternProperties"] = {r"^task\.": tasks["additionalProperties"]}


class Gate(Section):
    """Limits for the candidate against its parent. A limit left out has its default; null switches it off."""

    model_config = ConfigDict(json_schema_extra=_task_keys_in_schema)

    perplexity_increase: Share | None = 0.05
    """Most that held-out perplexity may rise, paired row by row."""

    kl_divergence: Annotated[Number, Field(gt=0)] | None = 0.1
    """Most nats a token between the parent's and the candidate's next-token distribution."""

    flipped_tokens: Annotated[Share, Field(le=1)] | None = 0.10
    """Largest share of positions where the greedy token differs from the parent's."""

    endless_answers: Annotated[Share, Field(le=1)] | None = 0.01
    """Largest share of answers that repeat a phrase without end where the parent's end; judged by the lower end."""

    speedup: Annotated[Number, Field(gt=0)] | None = None
    """Least tokens/s against the parent on the same hardware, interleaved."""

    tasks: dict[str, TaskLimit] = Field(default_factory=dict)
    """Limits of the task of this name, such as `task.triage: {min: 0.82}`."""

    @model_validator(mode="before")
    @classmethod
    def _from_task_keys(cls, value: Any) -> Any:
        """`task.triage: {...}` becomes `tasks: {triage: {...}}`."""
        if not isinstance(value, Mapping):
            return value
        named = {str(key)[5:]: item for key, item in value.items() if str(key).startswith(TASK_KEY)}
        if not named:
            return value
        others = {key: item for key, item in value.items() if not str(key).startswith(TASK_KEY)}
        tasks = others.get("tasks")
        return {**others, "tasks": {**(tasks if isinstance(tasks, Mapping) else {}), **named}}

    @model_serializer(mode="wrap")
    def _to_task_keys(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The way back, so that what is written can be read."""
        written: dict[str, Any] = write(self)
        tasks = written.pop("tasks", {})
        return {**written, **{TASK_KEY + name: limit for name, limit in tasks.items()}}


class Evaluate(Section):
    """What is measured on the candidate and on its parent, with the engine that will serve."""

    data: SourceRef
    """Held-out rows, as in train.dataset; none of them may stand in train.dataset."""

    tasks: list[Task] = Field(default_factory=list)
    """Tasks with a score."""

    max_rows: Positive = 200
    """Most held-out rows used."""

    context: Positive = 1024
    """Longest row in tokens."""

    gate: Gate | None = None
    """Absent: everything is measured and nothing is refused. `gate: {}`: the default limits."""

    @model_validator(mode="after")
    def _gate_names_tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise wrong_at("tasks", "has two tasks of one name; rename one")
        unknown = sorted(set(self.gate.tasks) - set(names)) if self.gate else []
        if unknown:
            known = ", ".join(names) or "none"
            raise wrong_at(
                f"gate.{TASK_KEY}{unknown[0]}", f"is not among the tasks ({known}); add the task or remove the limit"
            )
        return self
