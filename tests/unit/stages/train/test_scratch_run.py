"""A model from scratch on a real book: three unequal workers learn what one learns, and the result is a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import fetch_checkpoint
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.plan.stages import Stage, StageRequest
from fastserve.plan.training import training_facts
from fastserve.spec.train import Train
from fastserve.stages.train import state
from fastserve.stages.train.export import export
from fastserve.stages.train.group import Group
from fastserve.stages.train.order import Order
from fastserve.stages.train.scratch import config_of, facts_of, prepare
from fastserve.stages.train.task import Task
from fastserve.stages.train.tokens import open_corpus, tokenised
from fastserve.stages.train.worker import train
from fastserve.telemetry.progress import Reporter

ROOT = Path(__file__).parents[4]
BOOK = ROOT / "deployments" / "data" / "alice-train.txt"
SHAPE = ROOT / "deployments" / "models" / "small-llama"
STEPS = 12
SECTION: dict[str, Any] = {
    "method": "scratch",
    "scratch": {
        "vocabulary": 400,
        "config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 16},
    },
    "dataset": "book.txt",
    "precision": "fp32",
    "batchTokens": 1024,
    "maxLength": 64,
    "learningRate": 3e-3,
    "steps": STEPS,
    "checkpoint": {"everySteps": STEPS},
}
Runs = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model before it has weights, as the stage's process makes it."""
    return prepare(SHAPE, BOOK, Train.model_validate(SECTION), tmp_path_factory.mktemp("scratch") / "model")


def task_in(place: Path, folder: Path, **more: Any) -> tuple[Store, Task, Any]:
    place.mkdir()
    store = open_store(str(place))
    section = Train.model_validate(SECTION | more)
    request = StageRequest("book", Stage.TRAIN, "a" * 64, 1, section.model_dump(by_alias=True, mode="json"))
    attempts.claim(store, request)
    reference = tokenised(store, BOOK, "1" * 64, folder, section, Reporter(lambda _: None), scratch=place)
    corpus = open_corpus(store, reference)
    total = Order(corpus.lengths, section.batch_tokens, section.seed).steps_of(None, STEPS)
    facts = replace(training_facts(facts_of(folder, section), section), longest_tokens=reference.longest)
    digest = state.tokenizer_digest(folder)
    task = Task(store.uri, request, section, total, 1, digest, reference.longest, facts, config=config_of(folder))
    return store, task, corpus


def curve_of(store: Store, task: Task, corpus: Any) -> list[dict[str, Any]]:
    """The rows of a whole run on this rank; nothing of the source's folder is read."""
    rows: list[dict[str, Any]] = []
    ended = train(
        store, task, corpus, Path("/nonexistent"), Group.current(), on_step=lambda row: rows.append(dict(row))
    )
    assert (ended.step, ended.reason) == (STEPS, ""), ended.message
    return rows


def test_three_unequal_workers_learn_what_one_learns(folder: Path, tmp_path: Path) -> None:
    alone = curve_of(*task_in(tmp_path / "one", folder))
    workers = [{"profile": "local", "count": 1, "speed": speed} for speed in (1, 2, 4)]
    made = task_in(tmp_path / "three", folder, workers=workers)
    together = run_ranks(lambda: curve_of(*made), 3)
    assert [row["loss"] for row in together[0]] == pytest.approx([row["loss"] for row in alone], rel=2e-6)
    assert together[0] == together[1] == together[2]
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.3


def test_the_result_is_a_model(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store, task, corpus = task_in(tmp_path / "store", folder)
    last = curve_of(store, task, corpus)[-1]
    checkpoint = fetch_checkpoint(store, Stage.TRAIN, task.request.key, STEPS, tmp_path / "checkpoint")
    (tmp_path / "artifact").mkdir()
    export(folder, state.read_facts(checkpoint), state.read_parameters(checkpoint), tmp_path / "artifact")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "artifact" / "model")
    ids = torch.tensor([tokenizer(BOOK.read_text()[5000:7000])["input_ids"][:256]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(last["loss"], abs=0.35), "it knows of the text what it knew when it was trained"
