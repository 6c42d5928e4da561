"""A small world in which everything goes wrong, with the planner in it.

It is a real one in miniature: it has a store with committed keys, attempts that run, crash, get lost and commit late, a
serving cluster, a gateway's weights and figures, and a rollback pin. Moves are carried out as the real cluster does it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from fastserve.plan.keys import stage_keys
from fastserve.plan.moves import (
    Done,
    Move,
    Refuse,
    Resolve,
    RollBack,
    RunStage,
    Shift,
    StartRevision,
    StopAttempt,
    StopRevision,
    Unpin,
    Wait,
)
from fastserve.plan.observed import Attempt, AttemptState, Committed, LiveRevision, Observed, Pin, RevisionState, Window
from fastserve.plan.pipeline import next_moves
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.model import Model

BOUND = 60
"""Looks within which a world that works must come to rest."""

HELD_OUT = "file:///data/held-out.jsonl"
TRAIN = {"dataset": "file:///data/train.jsonl"}
COMPRESS = [{"quantize": {"format": "int8"}}]
MANIFESTS: list[dict[str, Any]] = [
    {"train": TRAIN, "compress": COMPRESS, "evaluate": {"data": HELD_OUT, "gate": {}}, "serve": {}},
    {"train": TRAIN, "compress": COMPRESS, "evaluate": {"data": HELD_OUT, "gate": {}}, "serve": {"context": 512}},
    {"train": TRAIN | {"seed": 1}, "compress": COMPRESS, "evaluate": {"data": HELD_OUT, "gate": {}}, "serve": {}},
    {
        "train": TRAIN,
        "compress": [{"quantize": {"format": "int8", "method": "roundToNearest"}}],
        "evaluate": {"data": HELD_OUT, "gate": {"perplexityIncrease": "50%"}},
        "serve": {},
    },
    {"train": TRAIN, "evaluate": {"data": HELD_OUT, "maxRows": 9, "gate": {}}, "serve": {}},
    {"train": TRAIN, "compress": COMPRESS},
    {"serve": {}},
    {"evaluate": {"data": HELD_OUT, "gate": {}}},
    {"serve": {"context": 256, "rollout": {"steps": [5, 25, 100], "hold": "10s"}}},
    {"serve": {"context": 128, "rollout": {"steps": [50, 75, 100], "hold": "30s"}}},
    {"serve": {"context": 64, "rollout": {"steps": [10, 100], "hold": "0s"}}},
]
PLAIN, STEPPED = 6, range(8, 11)
"""Of these manifests, the one that only serves, and those that do so with steps."""

CLEAR = 40
"""Requests of which half failed: as much as anybody needs to judge by."""
MEASURED = {"good": (0.01, 0.02), "unsure": (0.01, 0.2), "bad": (0.3, 0.4), "nan": (float("nan"), float("nan"))}


def manifest(index: int) -> Model:
    return Model.model_validate(
        {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "chat"},
            "spec": {"source": "file:///models/base", **MANIFESTS[index]},
        }
    )


MODELS = [manifest(index) for index in range(len(MANIFESTS))]


@dataclass
class Job:
    """An attempt, and whether its process still lives, whatever the cluster believes."""

    request: StageRequest
    state: AttemptState = AttemptState.RUNNING
    alive: bool = True
    reason: str = ""
    final: bool = False
    ended_at: float | None = None


@dataclass
class World:
    """Everything outside the planner."""

    now: float = 1_000_000.0
    content: dict[str, int] = field(default_factory=dict)
    """Version of each source's bytes."""

    digests: dict[str, str] = field(default_factory=dict)
    committed: dict[str, Committed] = field(default_factory=dict)
    jobs: dict[str, list[Job]] = field(default_factory=dict)
    forgiven: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, RevisionState] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    shifted_at: float | None = None
    proven: str | None = None
    cluster_since: float = 0.0
    started: dict[str, float] = field(default_factory=dict)
    """When each revision was asked to start."""

    told_since: float = 0.0
    """Since when the gateway counts: its start, or the last shift."""

    silent: bool = False
    """Whether the gateway tells nothing."""

    counted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Requests and failed ones by revision, since then."""

    quality: dict[str, str] = field(default_factory=dict)
    """fails (half of its requests) or slow (three times), by revision; the others are good."""

    pin: Pin | None = None
    measured: str = "good"

    def observe(self) -> Observed:
        attempts = {}
        for key, jobs in self.jobs.items():
            newest = jobs[-1]
            if key not in self.committed:
                attempts[key] = Attempt(
                    newest.request.attempt,
                    newest.state,
                    newest.reason,
                    final=newest.final,
                    ended_at=newest.ended_at,
                    model="chat",
                )
        return Observed(
            digests=dict(self.digests),
            committed=dict(self.committed),
            attempts=attempts,
            forgiven=dict(self.forgiven),
            revisions=tuple(
                LiveRevision(digest, state, since=self.started.get(digest))
                for digest, state in sorted(self.revisions.items())
            ),
            weights=dict(self.weights),
            shifted_at=self.shifted_at,
            proven=self.proven,
            windows={} if self.silent else {digest: self.window(digest) for digest in self.weights},
            cluster_since=self.cluster_since,
            pin=self.pin,
            known_revisions=dict(self.known),
        )

    def window(self, digest: str) -> Window:
        requests, errors = self.counted.get(digest, (0, 0))
        ttft_ms = 300.0 if self.quality.get(digest) == "slow" else 100.0
        seconds = self.now - max(self.told_since, self.shifted_at or 0.0)
        whole = requests - errors
        return Window(seconds, requests, errors, ttft_ms, 1.5 * ttft_ms, whole, 50.0, 30.0, whole)

    # -- what the cluster does -------------------------------------------------------------------------------------

    def apply(self, move: Move) -> None:
        match move:
            case Resolve(uri=uri):
                self.digests[uri] = f"{uri} version {self.content.get(uri, 0)}"
            case RunStage(request=request):
                jobs = self.jobs.setdefault(request.key, [])
                # A conditional create of request.json: an attempt's number is claimed once.
                if all(job.request.attempt != request.attempt for job in jobs):
                    jobs.append(Job(request))
            case StopAttempt(key=key, attempt=number):
                for job in self.jobs[key]:
                    if job.request.attempt == number and job.state is AttemptState.RUNNING:
                        job.state, job.alive, job.ended_at = AttemptState.LOST, False, self.now
            case StartRevision(revision=revision):
                self.known[revision.digest] = revision.to_json()
                if self.revisions.get(revision.digest) in (None, RevisionState.STOPPING):
                    self.revisions[revision.digest] = RevisionState.STARTING
                    self.started[revision.digest] = self.now
            case Shift(weights=weights):
                if weights != self.weights or self.shifted_at is None or self.shifted_at > self.now:
                    self.weights, self.shifted_at, self.counted = dict(weights), self.now, {}
                    self.proven = next((digest for digest, weight in weights.items() if weight == 100), self.proven)
            case RollBack(pin=pin):
                self.pin = pin
            case StopRevision(digest=digest):
                if digest in self.revisions:
                    self.revisions[digest] = RevisionState.STOPPING
            case Unpin():
                self.pin = None
            case Wait() | Done() | Refuse():
                pass
            case _:
                raise TypeError(move)

    # -- what happens ----------------------------------------------------------------------------------------------

    def newest(self, state: AttemptState) -> list[Job]:
        """Newest attempts in this state, at keys that have not committed."""
        open_keys = sorted(self.jobs.keys() - self.committed.keys())
        return [self.jobs[key][-1] for key in open_keys if self.jobs[key][-1].state is state]

    def commit(self, job: Job) -> None:
        """As the store does it: record.json is created once, and only for the newest attempt."""
        key, stage = job.request.key, job.request.stage
        job.alive = False
        if key in self.committed or job is not self.jobs[key][-1]:
            return
        if not set(job.request.inputs.values()) <= self.committed.keys():
            self.end(job, AttemptState.FAILED, "ArtifactNotFound")
            return
        metrics: dict[str, Any] = {}
        if stage is Stage.EVALUATE:
            low, high = MEASURED[self.measured]
            increase = {"value": low, "low": low, "high": high}
            small = {"value": 0.01, "low": 0.01, "high": 0.01}
            candidate = self.committed[job.request.inputs["candidate"]].digest
            parent = self.committed[job.request.inputs["parent"]].digest
            models = {"candidate": {"digest": candidate}, "parent": {"digest": parent}}
            metrics = {"rows": 20, "models": models, "perplexityIncrease": increase}
            metrics |= {"klDivergence": small, "flippedTokens": small}
        self.committed[key] = Committed(stage, key, f"bytes of {key}", 1, metrics)

    def end(self, job: Job, state: AttemptState, reason: str = "", final: bool = False, alive: bool = False) -> None:
        job.state, job.reason, job.final, job.alive, job.ended_at = state, reason, final, alive, self.now

    def ask(self, requests: int) -> None:
        """Clients ask; each revision gets its share."""
        for digest, weight in self.weights.items():
            before, failed = self.counted.get(digest, (0, 0))
            fresh = requests * weight // 100
            bad = fresh // 2 if self.quality.get(digest) == "fails" else 0
            self.counted[digest] = (before + fresh, failed + bad)

    def go_well(self) -> None:
        """Everything that is under way succeeds, and clients ask."""
        self.now += 20
        self.silent = False
        self.ask(2000)
        for job in self.newest(AttemptState.RUNNING):
            self.commit(job)
        for digest, state in list(self.revisions.items()):
            if state is RevisionState.STARTING:
                self.revisions[digest] = RevisionState.READY
            elif state is RevisionState.STOPPING:
                del self.revisions[digest]

    def serving(self) -> set[str]:
        """Revisions that answer requests."""
        ready = {digest for digest, state in self.revisions.items() if state is RevisionState.READY}
        return {digest for digest, weight in self.weights.items() if weight > 0} & ready


def passed_its_gate(world: World, model: Model) -> bool:
    """Judged by hand, not by `decide`: whether the model's candidate may serve."""
    evaluate = model.spec.evaluate
    if evaluate is None or evaluate.gate is None:
        return True
    keys = stage_keys(model, world.digests)
    measured = world.committed[keys[Stage.EVALUATE]].metrics
    same = measured["models"]["candidate"] == measured["models"]["parent"]
    return bool(same or measured["perplexityIncrease"]["high"] <= (evaluate.gate.perplexity_increase or 0))


def check_move(world: World, model: Model, move: Move) -> None:
    """What no move may ever do."""
    assert move.because.endswith((".", "again."))
    if isinstance(move, RunStage):
        assert move.request.key not in world.committed
        assert set(move.request.inputs.values()) <= world.committed.keys()
        assert not world.newest(AttemptState.RUNNING)
    if isinstance(move, StartRevision) and move.revision.digest not in world.known:
        assert move.revision.artifact_key in world.committed
        assert passed_its_gate(world, model)
    if isinstance(move, Shift):
        check_evidence(world, model, move)
        assert model.spec.serve is not None or not move.weights
        assert all(world.revisions.get(digest) is RevisionState.READY for digest in move.weights)
        assert not move.weights or sum(move.weights.values()) == 100
    if isinstance(move, StopRevision):
        assert world.weights.get(move.digest, 0) == 0
        assert world.revisions[move.digest] is not RevisionState.STOPPING


def check_evidence(world: World, model: Model, shift: Shift) -> None:
    """A new revision that clearly fails gets no more traffic than it has while there is an old one that answers."""
    if world.pin is not None or world.silent or model.spec.serve is None or model.spec.serve.rollout is None:
        return
    for digest, weight in shift.weights.items():
        requests, errors = world.counted.get(digest, (0, 0))
        others = world.serving() - {digest}
        clear = requests >= CLEAR and 3 * errors > requests and world.now >= (world.shifted_at or 0.0)
        if others and digest != world.proven and world.quality.get(digest) == "fails" and clear:
            assert all(world.quality.get(other) == "fails" for other in others) or weight <= world.weights[digest]


def look(world: World, model: Model) -> list[Move]:
    """One look and what follows from it; every move is carried out twice."""
    observed = world.observe()
    moves = next_moves(model, observed, world.now)
    assert moves
    assert moves == next_moves(model, observed, world.now)
    before = world.serving()
    for move in moves:
        check_move(world, model, move)
        world.apply(move)
        once = copy.deepcopy(world)
        world.apply(move)
        assert world == once
    if before and model.spec.serve is not None:
        assert world.serving()
    return moves


def rests(moves: list[Move]) -> bool:
    return all(isinstance(move, Done | Refuse) for move in moves)


def settle(world: World, model: Model) -> list[Move]:
    """Look until nothing is left to do, in a world where everything goes well from now on."""
    world.silent = False
    for _ in range(BOUND):
        moves = look(world, model)
        if rests(moves):
            world.go_well()
            assert look(world, model) == moves
            return moves
        world.go_well()
    raise AssertionError(f"no rest within {BOUND} looks: {moves}")
