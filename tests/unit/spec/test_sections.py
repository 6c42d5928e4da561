"""What keys of one block demand of each other, and the words of each refusal."""

from __future__ import annotations

import re

import pytest

from fastserve.errors import ManifestInvalid
from fastserve.spec.load import KINDS, read
from fastserve.spec.model import Model
from fastserve.spec.nearest import HABITS, KIND_HABITS
from fastserve.spec.section import is_name
from fastserve.spec.serve import Replicas
from fastserve.spec.shape import walk

HEAD = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: a}\nspec: "


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ("{source: a, serve: {replicas: {min: 3, max: 2}}}", "spec.serve.replicas.min", "above max"),
        ("{source: a, serve: {rollout: {steps: [25, 5]}}}", "spec.serve.rollout.steps", "end with 100"),
        ("{source: a, serve: {rollout: {maxErrorRate: 101%}}}", "spec.serve.rollout.maxErrorRate", "up to 100%"),
        ("{source: a, serve: {schedulerOptions: {quantum: 9}}}", "spec.serve.schedulerOptions", "belongs to mlfq"),
        (
            "{source: a, serve: {scheduler: mlfq, engine: {prefixCaching: false}}}",
            "spec.serve.scheduler",
            "resumes requests from the prefix cache",
        ),
        (
            "{source: a, serve: {scheduler: mlfq, schedulerOptions: {levels: 1}}}",
            "spec.serve.schedulerOptions.levels",
            "2",
        ),
        ("{source: a, serve: {engine: {kvCache: 0GiB}}}", "spec.serve.engine.kvCache", "above 0B"),
        ("{source: a, serve: {profiles: l4}}", "spec.serve.profiles", "write [l4]"),
        ("{source: a, serve: {context: 1.5}}", "spec.serve.context", "whole number"),
        ("{source: a, serve: {context: 1e400}}", "spec.serve.context", "whole number"),
        ("{source: a, serve: {context: 1e19}}", "spec.serve.context", "too large"),
        ("{source: a, serve: {target: {queue: .inf}}}", "spec.serve.target.queue", "number above 0"),
        ("{source: a, serve: {target: {ttft: 500}}}", "spec.serve.target.ttft", "500ms or 2m"),
        ("{source: a, serve: {target: {ttft: on}}}", "spec.serve.target.ttft", "on is true without quotes"),
        ("{source: a, serve: {task: chat}}", "spec.serve.task", "generate, embed, score, transcribe"),
        ("{source: a, serve: {task: generat}}", "spec.serve.task", "write generate"),
        ("{source: a, serve: {task: }}", "spec.serve.task", "is empty"),
        ("{source: a, serve: []}", "spec.serve", "must be a block, not a list"),
        (
            "{source: a, serve: {adapters: [{name: b, source: c}, {name: b, source: d}]}}",
            "spec.serve.adapters",
            "rename one",
        ),
        ("{source: a, train: {dataset: b, epochs: 1, steps: 2}}", "spec.train.epochs", "keep one"),
        ("{source: a, train: {dataset: b, method: full, lora: {}}}", "spec.train.lora", "write method: lora"),
        ("{source: a, train: {dataset: b, elastic: {minWorkers: 2}}}", "spec.train.elastic.minWorkers", "1 workers"),
        ("{source: a, train: {dataset: b, workers: []}}", "spec.train.workers", "at least one"),
        ("{source: a, train: {dataset: b, scratch: {}}}", "spec.train.scratch", "write method: scratch"),
        (
            "{source: a, train: {dataset: b, method: scratch, scratch: {config: {vocab_size: 512}}}}",
            "spec.train.scratch.config.vocab_size",
            "write scratch.vocabulary",
        ),
        (
            "{source: a, train: {dataset: b, method: scratch, scratch: {config: {rope_scaling: [1]}}}}",
            "spec.train.scratch.config.rope_scaling",
            "a number, a flag or a text",
        ),
        (
            "{source: a, train: {dataset: b, method: scratch, scratch: {vocabulary: 256}}}",
            "spec.train.scratch.vocabulary",
            "above 256",
        ),
        ("{source: a, train: {dataset: b, validation: {}}}", "spec.train.validation.data", "is missing"),
        (
            "{source: a, train: {dataset: b, validation: {data: c, patience: 0}}}",
            "spec.train.validation.patience",
            "whole number from 1",
        ),
        ("{source: a, train: {dataset: b, overLength: cut}}", "spec.train.overLength", "truncate, drop"),
        (
            "{source: a, train: {dataset: b, engine: fsdp2, workers: [{profile: a, count: 1}, {profile: b, count: 2}]}}",  # noqa: E501
            "spec.train.engine",
            "unequal profiles; write engine: sharded",
        ),
        (
            "{source: a, train: {dataset: b, engine: fsdp2, "
            "workers: [{profile: a, count: 1, speed: 2}, {profile: a, count: 2}]}}",
            "spec.train.engine",
            "unequal speeds; write engine: sharded",
        ),
        (
            "{source: a, train: {dataset: b, batchTokens: 2, workers: [{profile: a, count: 3}]}}",
            "spec.train.batchTokens",
            "fewer than the 3 workers",
        ),
        (
            f"{{source: a, train: {{dataset: b, workers: [{'{profile: a, count: 1}, ' * 257}]}}}}",
            "spec.train.workers",
            "has 257 items; write at most 256",
        ),
        (f"{{source: a, compress: [{'{prune: {layers: 0.9}}, ' * 33}]}}", "spec.compress", "write at most 32"),
        ("{source: a, train: {}}", "spec.train.dataset", "is missing"),
        ("{source: a, compress: [{}]}", "spec.compress[0]", "prune or quantize"),
        ("{source: a, compress: [{prune: {}}]}", "spec.compress[0].prune", "layers or width"),
        ("{source: a, compress: [{quantize: {}}]}", "spec.compress[0].quantize.format", "write `format: int8`"),
        ("{source: a, compress: {prune: {}}}", "spec.compress", "must be a list"),
        (
            "{source: a, compress: [{quantize: {format: int8, groupSize: 64}}]}",
            "spec.compress[0].quantize.groupSize",
            "remove groupSize",
        ),
        (
            "{source: a, evaluate: {data: b, tasks: [{name: t, data: c}, {name: t, data: d}]}}",
            "spec.evaluate.tasks",
            "rename",
        ),
        ("{source: a, evaluate: {data: b, gate: {task.t: {min: 1}}}}", "spec.evaluate.gate.task.t", "add the task"),
        ("{source: https://huggingface.co/org/name/tree/main}", "spec.source.uri", "write hf://org/name"),
        ("{source: gs://bucket/path}", "spec.source.uri", "'gs://' is not a source"),
        ("{source: hf://}", "spec.source.uri", "names nothing"),
        ("{source: hf://org/name@}", "spec.source.uri", "revision"),
        ("{source: file://data}", "spec.source.uri", "file:///"),
        ('{source: " "}', "spec.source.uri", "is empty"),
        ("{source: }", "spec.source", "is empty"),
        ("{source: [a]}", "spec.source", "must be a block"),
        ("{source: {uri: s3://a/b, revision: main}}", "spec.source.revision", "is for hf://"),
        ("{source: {uri: hf://org/name@a, revision: b}}", "spec.source.revision", "keep one"),
        ("{source: {uri: hf://org/name, tokenSecret: My_Token}}", "spec.source.tokenSecret", "my-token"),
    ],
)
def test_what_does_not_go_together_is_refused_at_its_key(spec: str, path: str, words: str) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(HEAD + spec)
    assert [problem.path for problem in caught.value.problems] == [path]
    assert words in caught.value.problems[0].message


@pytest.mark.parametrize(
    ("name", "near"),
    [("Support Chat", "support-chat"), ("-a-", "a"), ("a" * 64, "a" * 63), ("A.b", "a-b"), ("ü", None)],
)
def test_a_wrong_name_gets_the_nearest_right_one(name: str, near: str | None) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(HEAD.replace("name: a", f'name: "{name}"') + "{source: a}")
    (problem,) = caught.value.problems
    assert (problem.path, problem.suggestion) == ("metadata.name", near)
    assert near is None or is_name(near)


@pytest.mark.parametrize(
    ("written", "bounds"), [("{}", (1, 1)), ("{min: 3}", (3, 3)), ("{min: 0}", (0, 1)), ("{max: 8}", (1, 8))]
)
def test_a_least_number_of_replicas_raises_the_most(written: str, bounds: tuple[int, int]) -> None:
    (model,) = read(f"{HEAD}{{source: a, serve: {{replicas: {written}}}}}")
    assert isinstance(model, Model)
    assert model.spec.serve is not None
    assert (model.spec.serve.replicas.min, model.spec.serve.replicas.max) == bounds


@pytest.mark.parametrize("least", ["true", "1.5", "'3'", ".nan"])
def test_a_wrong_least_number_is_one_problem(least: str) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(f"{HEAD}{{source: a, serve: {{replicas: {{min: {least}}}}}}}")
    assert [problem.path for problem in caught.value.problems] == ["spec.serve.replicas.min"]


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Replicas().min = 2  # type: ignore[misc]


def test_every_habit_leads_to_a_key_that_exists() -> None:
    paths = {path.removeprefix("spec.") for path, _ in walk(KINDS["Model"])}
    assert {habit.to for habit in HABITS.values()} <= paths
    assert set(KIND_HABITS.values()) <= set(KINDS)


@pytest.mark.parametrize(
    "how", sorted({habit.how for habit in HABITS.values() if re.match(r"(such )?as \w+:", habit.how)})
)
def test_what_is_shown_instead_of_a_habit_is_read(how: str) -> None:
    shown = how.partition("as ")[2].replace("train: {", "train: {dataset: b, ")
    assert read(f"{HEAD}{{{shown if shown.startswith('source') else f'source: a, {shown}'}}}")
