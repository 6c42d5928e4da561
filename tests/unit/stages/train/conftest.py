"""A tiny model, its samples, and a store with a claimed attempt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_rows, write_tiny_llama

from fastserve.artifacts import attempts
from fastserve.artifacts.describe import describe
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.artifacts.tokenizer import load_tokenizer
from fastserve.data.samples import SampleSet, samples
from fastserve.plan.stages import Stage, StageRequest
from fastserve.plan.training import training_facts
from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.order import Order
from fastserve.stages.train.state import tokenizer_digest
from fastserve.stages.train.task import Task

KEY = "a" * 64


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def sample_set(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    files = load_tokenizer(tiny_model)
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)
    return samples([rows], files.tokenizer(), files.chat_template, 256, special=files.special)


@pytest.fixture(scope="session")
def corpus(sample_set: SampleSet) -> Corpus:
    return Corpus.of(sample_set.samples)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def new_task(store: Store, corpus: Corpus, tiny_model: Path) -> Callable[..., Task]:
    """`new_task(attempt=1, steps=6)`: what the workers of a claimed attempt are told."""

    def make(attempt: int = 1, **section: Any) -> Task:
        train = Train.model_validate(
            {"dataset": "rows.jsonl", "precision": "fp32", "batchTokens": 400, "learningRate": 1e-2, **section}
        )
        request = StageRequest("m", Stage.TRAIN, KEY, attempt, train.model_dump(by_alias=True, mode="json"))
        attempts.claim(store, request)
        total = Order(corpus.lengths, train.batch_tokens, train.seed).steps_of(train.epochs, train.steps)
        return Task(
            store.uri,
            request,
            train,
            total,
            threads=1,
            tokenizer=tokenizer_digest(tiny_model),
            longest=int(max(corpus.lengths)),
            facts=training_facts(describe(tiny_model), train),
        )

    return make
