"""Everything that can be known about a manifest before anything runs: sources, shapes, rows, bytes, time, refusals.

Whatever is wrong with the input is found here, by reading headers and rows and by nothing that starts a process.
What was found is kept by content digest, so a second look is quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastserve.artifacts import attempts, describe, sources
from fastserve.artifacts.adapter import read_adapter
from fastserve.artifacts.claims import mounted_claims
from fastserve.artifacts.resolved import Resolved
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.artifacts.tokenizer import TokenizerFiles, load_tokenizer
from fastserve.cluster.home import Home
from fastserve.cluster.machine import local_hardware
from fastserve.cluster.nodes import hardware_of, machines, profiles_of
from fastserve.cluster.observe import observe
from fastserve.cluster.ray_head import RayHead
from fastserve.data.holdout import require_disjoint
from fastserve.data.rows import data_files
from fastserve.data.samples import OverLength, dataset_facts
from fastserve.data.template import turn_end
from fastserve.data.vocabulary import train_tokenizer
from fastserve.errors import ArtifactNotFound, ManifestInvalid, Problem
from fastserve.plan import executable, keys
from fastserve.plan.adapters import adapter_keys
from fastserve.plan.digest import digest_of
from fastserve.plan.facts import LOCAL, DatasetFacts, Hardware, ModelFacts
from fastserve.plan.keys import Role, ident_of, outside
from fastserve.plan.lora import AdapterFacts, rank_limit
from fastserve.plan.memory import (
    ByteTable,
    compressed_bytes,
    context_problem,
    fits,
    replica_memory_bytes,
    serving_memory,
)
from fastserve.plan.observed import Committed
from fastserve.plan.revision import Revision
from fastserve.plan.sheet import AdapterLine, DatasetLine, Sheet, stage_lines
from fastserve.plan.stages import Stage
from fastserve.plan.tasks import task_problem
from fastserve.plan.time import estimate
from fastserve.plan.training import TrainingPlan, plan_training
from fastserve.spec.model import HardwareProfile, Model
from fastserve.spec.serve import Adapter
from fastserve.spec.source import Source
from fastserve.spec.train import Scratch, Train

FACTS_VERSION = 6
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
    cluster: Collection[str] = (LOCAL,),
    made: Mapping[str, Committed] | None = None,
) -> Survey:
    """Resolve, read and check everything that a Model names.

    cluster: names of the profiles that there are machines of (`machines_here` finds those of a home). made: artifacts
    by key that are known to be in a store that cannot be read from here.

    Raises NotExecutable, SourceNotFound, SourceInvalid, DatasetInvalid, InsufficientMemory: the first that is wrong,
    each with what to do. Nothing is changed but the home's cache.
    """
    hardware = local_hardware()
    executable.check(model, profiles, cluster, local=hardware, claims=mounted_claims())
    resolved = {item.ident: resolve_source(home, item.source, item.role) for item in outside(model)}
    look = _Look(home, resolved)
    facts = look.made(model)
    _require_able(model, facts)
    datasets = look.datasets(model)
    adapters = look.adapters(home, model, facts)
    digests = {ident: found.digest for ident, found in resolved.items()}
    store = open_store(store_uri)
    observed = observe(home, store, model, {}, {}, digests=digests)
    observed = replace(observed, committed={**observed.committed, **(made or {})})
    cached = {item.stage for item in observed.committed.values()}
    rows = next((line.facts for line in datasets if line.role == "train.dataset"), None)
    training = _training(model, facts, hardware, profiles, rows)
    shares = training.shares if training is not None else None
    sheet = Sheet(
        model=model.name,
        stages=stage_lines(model, observed, estimate(model, facts, rows, hardware, cached, shares)),
        datasets=tuple(datasets),
        tables=(
            *(training.tables if training is not None else ()),
            *_serving(model, facts, hardware, profiles, adapters),
        ),
        adapters=tuple(adapters),
        training=training,
        warnings=(*facts.warnings, *(training.warnings if training is not None else ())),
    )
    return Survey(model, digests, sheet)


def machines_here(home: Home) -> set[str]:
    """Profiles that a home has machines of: this machine, and nodes that have joined its Ray head."""
    endpoint = RayHead(home.path).load()
    joined = set() if endpoint is None else profiles_of(machines(endpoint.dashboard_url, endpoint.token))
    return {LOCAL, *joined}


def tries_so_far(store: Store, found: Survey) -> dict[str, int]:
    """By key, the newest attempt there is: asking for a Model again is trying again, so these no longer count."""
    made = list(keys.stage_keys(found.model, found.digests).items())
    made += [(Stage.SOURCE, key) for key in adapter_keys(found.model, found.digests).values()]
    return {key: attempts.newest_attempt(store, stage, key) for stage, key in made}


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
        self._vocabulary: list[object] = []
        """What a trained tokenizer was trained on; empty where the source's own is kept."""

    def made(self, model: Model) -> ModelFacts:
        """Facts of the source; for method scratch of the model that is made in its shape, with the tokenizer that it
        will have, which is trained here already where one is asked for."""
        train, source = model.spec.train, model.spec.source
        if train is None or train.method != "scratch":
            return self.model(source)
        scratch = train.scratch or Scratch()
        if scratch.vocabulary is not None:
            self._vocabulary = [self._resolved[ident_of(train.dataset)].digest, scratch.vocabulary]
            self._tokenizers[ident_of(source)] = self._trained_tokenizer(train.dataset, scratch.vocabulary)
        stored_as = {"bf16": "bfloat16", "fp16": "float16"}.get(train.precision, "float32")

        def read() -> dict[str, Any]:
            files = self._tokenizer(source)
            return asdict(describe.describe_new(self._place(source), scratch, stored_as, files, _end_of_turn(files)))

        wanted = scratch.model_dump(mode="json")
        return _facts(self._kept("scratch", [self._digest(source), wanted, stored_as, *self._vocabulary], read))

    def model(self, source: Source) -> ModelFacts:
        """Shape, size and end tokens of a model; tokenizers and headers are read, weights are not."""

        def read() -> dict[str, Any]:
            if not describe.has_weights(self._place(source)):
                describe.describe(self._place(source))  # says what is missing, a tokenizer too
            files = self._tokenizer(source)
            return asdict(describe.describe(self._place(source), files, _end_of_turn(files)))

        return _facts(self._kept("model", [self._digest(source)], read))

    def datasets(self, model: Model) -> list[DatasetLine]:
        """Rows, tokens and trained tokens of every data set, after checking each row."""
        spec = model.spec
        lines = []
        if spec.train is not None:
            found = self._train_rows(spec.train.dataset, spec.source, spec.train)
            lines.append(DatasetLine("train.dataset", found))
            lines.extend(self._validation(spec.train, spec.source))
        if spec.evaluate is not None:
            context = spec.evaluate.context
            lines.append(DatasetLine("evaluate.data", self._rows(spec.evaluate.data, spec.source, context, "context")))
            for task in spec.evaluate.tasks:
                found = self._rows(task.data, spec.source, context, "context")
                lines.append(DatasetLine(f"evaluate.tasks.{task.name}", found))
        if spec.train is not None and spec.evaluate is not None:
            self._disjoint(spec.train.dataset, spec.evaluate.data, "evaluate.data")
        for step in spec.compress:
            calibration = step.quantize.calibration if step.quantize else None
            if calibration is not None and calibration.data is not None:
                found = self._rows(calibration.data, spec.source, calibration.max_length, "calibration.maxLength")
                lines.append(DatasetLine("compress.calibration", found))
        return lines

    def adapters(self, home: Home, model: Model, facts: ModelFacts) -> list[AdapterLine]:
        """Every adapter, looked into; facts: of the model that they shall change."""
        if model.spec.serve is None:
            return []
        _require_free_names(home, model)
        lines = []
        for adapter in model.spec.serve.adapters:

            def read(adapter: Adapter = adapter) -> dict[str, Any]:
                return asdict(read_adapter(self._place(adapter.source), f"adapter {adapter.name}", facts))

            inputs = [adapter.name, self._digest(adapter.source), asdict(facts)]
            found = self._kept("adapter", inputs, read)
            lines.append(AdapterLine(adapter.name, AdapterFacts(**{**found, "modules": tuple(found["modules"])})))
        return lines

    def _rows(
        self, data: Source, model: Source, limit: int, limit_name: str, over_length: OverLength = "truncate"
    ) -> DatasetFacts:
        digests = [self._resolved[ident_of(source)].digest for source in (data, model)]

        def read() -> dict[str, Any]:
            files = self._tokenizer(model)
            found = dataset_facts(
                data_files(self._place(data)),
                files.tokenizer(),
                files.chat_template,
                limit,
                special=files.special,
                limit_name=limit_name,
                over_length=over_length,
            )
            return asdict(found)

        return DatasetFacts(**self._kept("rows", [*digests, *self._vocabulary, limit, limit_name, over_length], read))

    def _train_rows(self, data: Source, source: Source, train: Train) -> DatasetFacts:
        return self._rows(data, source, train.max_length, "maxLength", train.over_length)

    def _validation(self, train: Train, source: Source) -> list[DatasetLine]:
        if train.validation is None:
            return []
        found = self._train_rows(train.validation.data, source, train)
        self._disjoint(train.dataset, train.validation.data, "train.validation.data")
        return [DatasetLine("train.validation.data", found)]

    def _disjoint(self, train: Source, held_out: Source, held_out_name: str) -> None:
        digests = [self._resolved[ident_of(source)].digest for source in (train, held_out)]

        def read() -> dict[str, Any]:
            require_disjoint(data_files(self._place(train)), data_files(self._place(held_out)), held_out_name)
            return {"disjoint": True}

        self._kept("disjoint", digests, read)

    def _digest(self, source: Source) -> str:
        return self._resolved[ident_of(source)].digest

    def _trained_tokenizer(self, data: Source, vocabulary: int) -> TokenizerFiles:
        """The tokenizer that the train stage will train, from the same rows."""
        into = self._home.path / "cache" / "tokenizers" / digest_of([FACTS_VERSION, *self._vocabulary])[:24]
        if not into.is_dir():
            part = into.with_name(f"{into.name}.{os.getpid()}.part")
            train_tokenizer(self._place(data), vocabulary, part)
            part.rename(into)
        return load_tokenizer(into)

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


def _facts(found: Mapping[str, Any]) -> ModelFacts:
    lists = {
        name: tuple(tuple(item) if isinstance(item, list) else item for item in value)
        for name, value in found.items()
        if isinstance(value, list)
    }
    return ModelFacts(**{**found, **lists})


def _end_of_turn(files: TokenizerFiles) -> int | None:
    if files.chat_template is None:
        return None
    return turn_end(files.chat_template, files.tokenizer(), special=files.special)


def _training(
    model: Model,
    facts: ModelFacts,
    hardware: Hardware,
    profiles: Sequence[HardwareProfile],
    rows: DatasetFacts | None,
) -> TrainingPlan | None:
    if model.spec.train is None:
        return None
    described = {profile.metadata.name: profile.spec for profile in profiles}
    return plan_training(facts, model.spec.train, hardware, described, rows)


def _require_free_names(home: Home, model: Model) -> None:
    """Raise ManifestInvalid for an adapter that is called like a model, or like another model's adapter."""
    taken = {model.name: "this model"}
    for name in home.model_names():
        other = home.model(name)
        if name != model.name and other is not None:
            taken[name] = f"model {name}"
            serve = other.spec.serve
            taken |= {item.name: f"an adapter of model {name}" for item in (serve.adapters if serve else [])}
    found = model.spec.serve.adapters if model.spec.serve is not None else []
    problems = [
        Problem(f"spec.serve.adapters[{index}].name", f"{item.name} is the name of {taken[item.name]}; rename it")
        for index, item in enumerate(found)
        if item.name in taken
    ]
    if problems:
        raise ManifestInvalid(problems)


def _require_able(model: Model, facts: ModelFacts) -> None:
    """Raise ManifestInvalid when the model cannot do what serve.task asks of it, or not in serve.context."""
    serve = model.spec.serve
    if serve is not None:
        problems = [
            item for item in (task_problem(serve.task, facts), context_problem(serve, facts)) if item is not None
        ]
        if problems:
            raise ManifestInvalid(problems)


def _serving(
    model: Model,
    facts: ModelFacts,
    local: Hardware,
    profiles: Sequence[HardwareProfile],
    adapters: Sequence[AdapterLine],
) -> list[ByteTable]:
    """What a replica needs on each of its profiles. Raises InsufficientMemory where one does not hold it."""
    serve = model.spec.serve
    if serve is None:
        return []
    described = {profile.metadata.name: profile.spec for profile in profiles}
    limit = rank_limit(line.facts.rank for line in adapters)
    weight_bytes = compressed_bytes(facts, model.spec.compress)
    found = []
    for profile in serve.profiles:
        hardware = hardware_of(profile, described, local)
        table = serving_memory(facts, serve, weight_bytes, hardware, limit)
        if len(serve.profiles) > 1:
            table = replace(table, title=f"{table.title}, profile {profile}")
        found.append(fits(table, replica_memory_bytes(serve, hardware, profile in described)))
    return found
