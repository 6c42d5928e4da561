"""Everything that can be known about a manifest before anything runs: sources, shapes, rows, bytes, time, refusals.

Whatever is wrong with the input is found here, by reading headers and rows and by nothing that starts a process.
What was found is kept by content digest, so a second look is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastserve.artifacts import attempts, describe, sources
from fastserve.artifacts.resolved import Resolved
from fastserve.artifacts.store import Store, open_store
from fastserve.artifacts.tokenizer import TokenizerFiles, load_tokenizer
from fastserve.cluster.home import Home
from fastserve.cluster.machine import local_hardware
from fastserve.cluster.observe import observe
from fastserve.data.holdout import require_disjoint
from fastserve.data.rows import data_files
from fastserve.data.samples import samples
from fastserve.data.template import turn_end
from fastserve.errors import ArtifactNotFound
from fastserve.plan import executable
from fastserve.plan.digest import digest_of
from fastserve.plan.facts import DatasetFacts, ModelFacts
from fastserve.plan.keys import Role, ident_of, outside
from fastserve.plan.memory import ByteTable, compressed_bytes, fits, serving_memory, training_memory
from fastserve.plan.revision import Revision
from fastserve.plan.sheet import DatasetLine, Sheet, stage_lines
from fastserve.plan.time import estimate
from fastserve.spec.model import AccessKey, HardwareProfile, Model
from fastserve.spec.source import Source

FACTS_VERSION = 1
"""Raised when what is counted changes, so that older counts in a home are not believed."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found out about one Model."""

    model: Model
    digests: Mapping[str, str]
    """Digest of every outside source by ident."""

    sheet: Sheet


def survey(
    home: Home,
    store_uri: str,
    model: Model,
    profiles: Sequence[HardwareProfile] = (),
    access_keys: Sequence[AccessKey] = (),
) -> Survey:
    """Resolve, read and check everything that a Model names.

    Raises NotExecutable, SourceNotFound, SourceInvalid, DatasetInvalid, InsufficientMemory: the first that is wrong,
    each with what to do. Nothing is changed but the home's cache.
    """
    executable.check(model, profiles)
    for key in access_keys:
        executable.check_access_key(key)
    resolved = {item.ident: resolve_source(home, item.source, item.role) for item in outside(model)}
    look = _Look(home, resolved)
    facts = look.model(model.spec.source)
    datasets = look.datasets(model)
    digests = {ident: found.digest for ident, found in resolved.items()}
    store = open_store(store_uri)
    observed = observe(home, store, model, {}, {}, digests=digests)
    cached = {item.stage for item in observed.committed.values()}
    hardware = local_hardware()
    train = next((line.facts for line in datasets if line.role == "train.dataset"), None)
    sheet = Sheet(
        model=model.name,
        stages=stage_lines(model, observed, estimate(model, facts, train, hardware, cached)),
        datasets=tuple(datasets),
        tables=tuple(fits(table, hardware.memory_bytes) for table in _tables(model, facts)),
        warnings=facts.warnings,
    )
    return Survey(model, digests, sheet)


def resolve_source(home: Home, source: Source, role: str) -> Resolved:
    """What a source is now. Digests of local files are remembered by size and time of change."""
    kind: Role = "data" if role == "data" else "adapter" if role == "adapter" else "model"
    home.create()
    return sources.resolve(source, role=kind, digest_cache=home.path / "cache" / "digests.json")


def revision_facts(store: Store, revision: Revision) -> ModelFacts:
    """Shape of the model that a revision serves. Raises ArtifactNotFound when its artifact is gone."""
    record = attempts.find(store, revision.artifact_stage, revision.artifact_key)
    if record is None:
        raise ArtifactNotFound(
            f"the {revision.artifact_stage} artifact of revision {revision.short} is no longer in {store.uri}; "
            "run `fastserve up` again to make it anew"
        )
    return describe.describe(attempts.fetch(store, record) / "model")


class _Look:
    """Reads a manifest's sources, each once."""

    def __init__(self, home: Home, resolved: Mapping[str, Resolved]) -> None:
        self._home = home
        self._resolved = resolved
        self._tokenizers: dict[str, TokenizerFiles] = {}

    def model(self, source: Source) -> ModelFacts:
        """Shape, size and end tokens of a model; tokenizers and headers are read, weights are not."""
        digest = self._resolved[ident_of(source)].digest

        def read() -> dict[str, Any]:
            files = self._tokenizer(source)
            ends = (
                None
                if files.chat_template is None
                else turn_end(files.chat_template, files.tokenizer(), special=files.special)
            )
            return asdict(describe.describe(self._place(source), files, ends))

        found = self._kept("model", [digest], read)
        return ModelFacts(**{**found, "stop_tokens": tuple(found["stop_tokens"]), "warnings": tuple(found["warnings"])})

    def datasets(self, model: Model) -> list[DatasetLine]:
        """Rows, tokens and trained tokens of every data set, after checking each row."""
        spec = model.spec
        lines = []
        if spec.train is not None:
            found = self._rows(spec.train.dataset, spec.source, spec.train.max_length, "maxLength")
            lines.append(DatasetLine("train.dataset", found))
        if spec.evaluate is not None:
            context = spec.evaluate.context
            lines.append(DatasetLine("evaluate.data", self._rows(spec.evaluate.data, spec.source, context, "context")))
            for task in spec.evaluate.tasks:
                found = self._rows(task.data, spec.source, context, "context")
                lines.append(DatasetLine(f"evaluate.tasks.{task.name}", found))
        if spec.train is not None and spec.evaluate is not None:
            self._disjoint(spec.train.dataset, spec.evaluate.data)
        for step in spec.compress:
            calibration = step.quantize.calibration if step.quantize else None
            if calibration is not None and calibration.data is not None:
                found = self._rows(calibration.data, spec.source, calibration.max_length, "calibration.maxLength")
                lines.append(DatasetLine("compress.calibration", found))
        return lines

    def _rows(self, data: Source, model: Source, limit: int, limit_name: str) -> DatasetFacts:
        digests = [self._resolved[ident_of(source)].digest for source in (data, model)]

        def read() -> dict[str, Any]:
            files = self._tokenizer(model)
            found = samples(
                data_files(self._place(data)),
                files.tokenizer(),
                files.chat_template,
                limit,
                special=files.special,
                limit_name=limit_name,
            )
            return asdict(found.facts)

        return DatasetFacts(**self._kept("rows", [*digests, limit, limit_name], read))

    def _disjoint(self, train: Source, held_out: Source) -> None:
        digests = [self._resolved[ident_of(source)].digest for source in (train, held_out)]

        def read() -> dict[str, Any]:
            require_disjoint(data_files(self._place(train)), data_files(self._place(held_out)))
            return {"disjoint": True}

        self._kept("disjoint", digests, read)

    def _tokenizer(self, source: Source) -> TokenizerFiles:
        ident = ident_of(source)
        if ident not in self._tokenizers:
            self._tokenizers[ident] = load_tokenizer(self._place(source))
        return self._tokenizers[ident]

    def _place(self, source: Source) -> Path:
        """Where a source can be read: its own place on this machine, else a copy that is fetched once."""
        resolved = self._resolved[ident_of(source)]
        into = self._home.path / "cache" / "outlines" / digest_of([resolved.digest, resolved.role])[:24]
        done = into.with_suffix(".path")
        if done.exists():
            return Path(done.read_text())
        place = sources.outline(source, resolved, into)
        if place.is_relative_to(into):
            done.write_text(str(place))
        return place

    def _kept(self, kind: str, inputs: Sequence[object], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `read` returns, remembered by what it was read from."""
        name = f"cache/facts/{kind}-{digest_of([FACTS_VERSION, *inputs])[:24]}.json"
        found = self._home.read_json(name)
        if found is None:
            found = read()
            self._home.write_json(name, found)
        return dict(found)


def _tables(model: Model, facts: ModelFacts) -> list[ByteTable]:
    spec = model.spec
    hardware = local_hardware()
    found = []
    if spec.train is not None:
        found.append(training_memory(facts, spec.train, spec.train.worker_count))
    if spec.serve is not None:
        weights = compressed_bytes(facts, spec.compress)
        found.append(serving_memory(facts, spec.serve, weights, hardware))
    return found
