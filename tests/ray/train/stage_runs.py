"""The train stage as a cluster would start it: attempts in processes of their own, on a Ray of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.describe import describe
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.artifacts.tokenizer import load_tokenizer
from fastserve.data.samples import samples
from fastserve.plan.stages import Stage, StageRequest
from fastserve.plan.training import training_facts
from fastserve.spec.source import Source
from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.group import Group
from fastserve.stages.train.state import tokenizer_digest
from fastserve.stages.train.task import Task
from fastserve.stages.train.worker import train as train_here

PLATFORM = Path(__file__).resolve().parents[3] / "platform"
SOURCE_KEY = "b" * 64


@dataclass(frozen=True)
class Cluster:
    """A Ray in a process of its own, which ends when its input does."""

    address: str
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def say(self, command: str) -> None:
        """A line for the cluster's script; returns when it has said that it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            assert line, "the cluster's process ended"
            if line.startswith("done"):
                return


@contextmanager
def ray_cluster(script: str, **more: str) -> Iterator[Cluster]:
    """The cluster that `script` starts: it gets a folder, and prints the address first.

    more: variables of the cluster and of the stages on it.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(PLATFORM),
        "RAY_AUTH_MODE": "disabled",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }
    environment.pop("RAY_ADDRESS", None)
    # Ray's sockets lie below its temporary folder, and their paths may be 107 bytes long.
    folder = Path(tempfile.mkdtemp(prefix="fs-ray-", dir="/tmp"))
    (folder / "ray").mkdir()  # where Ray notes the address of the newest cluster, but does not make it
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder / "ray")],
        env={**environment, "RAY_TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "Ray did not start"
        yield Cluster(address, process, {**environment, "RAY_ADDRESS": address})
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=120)
        finally:
            process.kill()
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def store_with_a_model(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a tiny model as the source stage leaves it."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    folder = tmp_path_factory.mktemp("source")
    write_tiny_llama(folder / "model", layers=4, hidden=64)
    request = StageRequest("tiny", Stage.SOURCE, SOURCE_KEY, 1, {})
    attempts.claim(store, request)
    attempts.commit(store, request, folder, {}, {})
    return store


@dataclass(frozen=True)
class Run:
    """One attempt, as a process of its own."""

    request: StageRequest
    store: Store
    process: subprocess.Popen[bytes]
    log: Path

    def progress(self) -> dict[str, Any]:
        """What the attempt has reported."""
        return attempts.read_progress(self.store, Stage.TRAIN, self.request.key, self.request.attempt) or {}

    def done(self) -> float:
        """Steps done."""
        told = self.progress()
        return told["done"] if told.get("unit") == "steps" else 0

    def profiles(self) -> list[str]:
        """Profiles of the workers that take part now."""
        return sorted(worker["profile"] for worker in self.progress().get("metrics", {}).get("workers", []))

    def losses(self) -> dict[int, float]:
        """Losses so far, by step."""
        text = attempts.read_curve(self.store, Stage.TRAIN, self.request.key).decode()
        return {row["step"]: row["loss"] for row in map(json.loads, text.splitlines())}

    def until(self, reached: Callable[[], bool], timeout_seconds: float = 600) -> None:
        """Wait; the log is shown when the attempt ends or hangs before."""
        end = time.monotonic() + timeout_seconds
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"rc {self.process.poll()}, {self.progress()}:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.1)

    def record(self) -> Record:
        """Wait for the end, which must be a committed artifact."""
        if self.process.wait(timeout=900) != 0:
            pytest.fail(self.log.read_text()[-6000:])
        record = attempts.find(self.store, Stage.TRAIN, self.request.key)
        assert record is not None
        return record


class Starter:
    """Starts attempts of the train stage, and ends what is left of them."""

    def __init__(self, cluster: Cluster, store: Store, folder: Path) -> None:
        self._cluster, self._store, self._folder = cluster, store, folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, key: str, rows: Path, section: Mapping[str, Any], attempt: int = 1) -> Run:
        """One attempt. key: one hex digit. section: of the manifest, without its data set."""
        source = Source(uri=rows.as_uri())
        resolved = sources.resolve(source, role="data")
        request = StageRequest(
            "tiny",
            Stage.TRAIN,
            key * 64,
            attempt,
            {"dataset": {"uri": source.uri}, **section},
            {"model": SOURCE_KEY},
            {"model": Stage.SOURCE},
            {resolved.ident: resolved.digest},
        )
        assert attempts.claim(self._store, request)
        log = self._folder / f"{key}-{attempt}.log"
        arguments = ["--store", self._store.uri, "--stage", "train", "--key", request.key, "--attempt", str(attempt)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastserve.stages.entry", *arguments],
                env={**self._cluster.environment, "FASTSERVE_SCRATCH": str(self._folder / "scratch")},
                stdout=stream,
                stderr=stream,
            )
        self._started.append(process)
        return Run(request, self._store, process, log)

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()


def alone(
    store: Store, request: StageRequest, section: Mapping[str, Any], rows: Path, folder: Path, most: int
) -> list[Mapping[str, Any]]:
    """Rows of the curve of the first `most` steps of an attempt, in this process, where nobody disturbs it.

    section: of the manifest, without its data set. folder: an empty one, for a store that nobody else has.
    """
    import torch

    source = attempts.find(store, Stage.SOURCE, SOURCE_KEY)
    assert source is not None
    model = attempts.fetch(store, source) / "model"
    files = load_tokenizer(model)
    train = Train.model_validate({"dataset": "rows.jsonl", **section})
    found = samples([rows], files.tokenizer(), files.chat_template, train.max_length, special=files.special)
    corpus = Corpus.of(found.samples)
    own = open_store(str(folder))
    attempts.claim(own, request)
    facts = training_facts(describe(model), train)
    assert train.steps is not None
    task = Task(own.uri, request, train, train.steps, 1, tokenizer_digest(model), int(max(corpus.lengths)), facts)
    told: list[Mapping[str, Any]] = []
    torch.set_num_threads(1)  # several would wait for each other at every product, and for long beside other work
    train_here(own, task, corpus, model, Group(), told.append, paused=lambda: len(told) >= most - 1)
    return told


def curve(store: Store, record: Record) -> list[dict[str, Any]]:
    """Rows of the artifact's loss curve."""
    text = (attempts.fetch(store, record) / "curve.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
