"""A small world in which everything goes wrong, and the planner in it: whatever happened, looking again ends well.

The world is a real one in miniature: it has a store with committed keys, attempts that run, crash, get lost and commit
late, a serving cluster, a gateway's weights and a rollback pin. Moves are carried out as the real cluster does it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.plan.keys import outside, stage_keys
from fastserve.plan.moves import (
    Done,
    Move,
    Refuse,
    Resolve,
    RunStage,
    Shift,
    StartRevision,
    StopAttempt,
    StopRevision,
    Unpin,
    Wait,
)
from fastserve.plan.observed import Attempt, AttemptState, Committed, LiveRevision, Observed, Pin, RevisionState
from fastserve.plan.pipeline import next_moves, wanted_revision
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
]
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
            revisions=tuple(LiveRevision(digest, state) for digest, state in sorted(self.revisions.items())),
            weights=dict(self.weights),
            pin=self.pin,
            known_revisions=dict(self.known),
        )

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
            case Shift(weights=weights):
                self.weights = dict(weights)
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

    def go_well(self) -> None:
        """Everything that is under way succeeds."""
        self.now += 20
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
        assert model.spec.serve is not None or not move.weights
        assert all(world.revisions.get(digest) is RevisionState.READY for digest in move.weights)
        assert not move.weights or sum(move.weights.values()) == 100
    if isinstance(move, StopRevision):
        assert world.weights.get(move.digest, 0) == 0
        assert world.revisions[move.digest] is not RevisionState.STOPPING


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
    for _ in range(BOUND):
        moves = look(world, model)
        if rests(moves):
            world.go_well()
            assert look(world, model) == moves
            return moves
        world.go_well()
    raise AssertionError(f"no rest within {BOUND} looks: {moves}")


class AnyWorld(RuleBasedStateMachine):
    """Things happen in any order; between them, the planner looks or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.model = MODELS[0]

    @rule(times=st.integers(1, 4))
    def look_and_act(self, times: int) -> None:
        for _ in range(times):
            look(self.world, self.model)

    @rule()
    def all_goes_well(self) -> None:
        self.world.go_well()

    @rule(index=st.integers(0, len(MODELS) - 1))
    def the_manifest_changes(self, index: int) -> None:
        self.model = MODELS[index]

    @rule(which=st.integers(0, 2))
    def a_source_changes(self, which: int) -> None:
        idents = [item.ident for item in outside(MODELS[0])]
        ident = idents[which % len(idents)]
        self.world.content[ident] = self.world.content.get(ident, 0) + 1
        self.world.digests.pop(ident, None)

    @rule(measured=st.sampled_from(sorted(MEASURED)))
    def the_next_measurement_is(self, measured: str) -> None:
        self.world.measured = measured

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0, -100.0]))
    def the_clock_moves(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: self.world.newest(AttemptState.RUNNING))
    @rule(how=st.sampled_from(["commits", "fails", "is refused", "is killed", "is cut off"]))
    def an_attempt(self, how: str) -> None:
        job = self.world.newest(AttemptState.RUNNING)[0]
        if how == "commits":
            self.world.commit(job)
        elif how == "fails":
            self.world.end(job, AttemptState.FAILED, "StageFailed")
        elif how == "is refused":
            self.world.end(job, AttemptState.FAILED, "DatasetInvalid", final=True)
        else:
            # Cut off: nobody hears of it, but its process goes on and may commit late.
            self.world.end(job, AttemptState.LOST, alive=how == "is cut off")

    @precondition(lambda self: any(job.alive for jobs in self.world.jobs.values() for job in jobs))
    @rule()
    def a_late_attempt_commits(self) -> None:
        for _, jobs in sorted(self.world.jobs.items()):
            for job in jobs:
                if job.alive and job.state is AttemptState.LOST:
                    self.world.commit(job)

    @precondition(lambda self: self.world.committed)
    @rule(index=st.integers(0, 7))
    def an_artifact_disappears(self, index: int) -> None:
        key = sorted(self.world.committed)[index % len(self.world.committed)]
        del self.world.committed[key]
        self.world.jobs.pop(key, None)

    @precondition(lambda self: self.world.revisions)
    @rule(index=st.integers(0, 3), state=st.sampled_from([RevisionState.READY, RevisionState.FAILED]))
    def an_engine_changes(self, index: int, state: RevisionState) -> None:
        digest = sorted(self.world.revisions)[index % len(self.world.revisions)]
        if self.world.revisions[digest] is not RevisionState.STOPPING:
            self.world.revisions[digest] = state

    @rule()
    def the_cluster_dies(self) -> None:
        self.world.revisions.clear()
        for job in self.world.newest(AttemptState.RUNNING):
            self.world.end(job, AttemptState.LOST)

    @rule()
    def the_routes_are_lost(self) -> None:
        self.world.weights = {}

    @precondition(lambda self: self.world.known)
    @rule(index=st.integers(0, 5), unknown=st.booleans())
    def somebody_rolls_back(self, index: int, unknown: bool) -> None:
        observed = self.world.observe()
        keys = stage_keys(self.model, observed.digests)
        wanted = wanted_revision(self.model, observed, keys)
        target = "f" * 64 if unknown else sorted(self.world.known)[index % len(self.world.known)]
        self.world.pin = Pin(target, wanted.digest if wanted else "0" * 64)

    @rule()
    def somebody_asks_again(self) -> None:
        """As `fastserve up` does when it begins: failures so far are forgiven and failed engines taken away."""
        self.world.forgiven = {key: jobs[-1].request.attempt for key, jobs in self.world.jobs.items()}
        failed = [digest for digest, state in self.world.revisions.items() if state is RevisionState.FAILED]
        for digest in failed:
            del self.world.revisions[digest]

    @rule()
    def it_comes_to_rest(self) -> None:
        world, model = copy.deepcopy(self.world), self.model
        moves = settle(world, model)
        refusals = [move for move in moves if isinstance(move, Refuse)]
        if refusals:
            assert all(move.reason and move.stage for move in refusals)
            return
        keys = stage_keys(model, world.digests)
        if model.spec.serve is None:
            assert not world.weights
            assert not world.revisions
            return
        wanted = wanted_revision(model, world.observe(), keys)
        assert wanted is not None
        served = world.pin.revision if world.pin else wanted.digest
        assert world.serving() == {served}
        assert world.weights == {served: 100}
        assert set(world.revisions) == {served}

    @invariant()
    def only_what_was_started_has_traffic(self) -> None:
        assert all(digest in self.world.known for digest in self.world.weights)


AnyWorld.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyWorld = AnyWorld.TestCase


@pytest.mark.parametrize("index", range(len(MODELS)))
def test_from_nothing_every_manifest_comes_to_rest(index: int) -> None:
    world = World()
    moves = settle(world, MODELS[index])
    assert all(isinstance(move, Done) for move in moves)


def test_an_unchanged_manifest_runs_nothing_again() -> None:
    world = World()
    settle(world, MODELS[0])
    jobs = copy.deepcopy(world.jobs)
    world.revisions.clear()
    settle(world, MODELS[0])
    assert world.jobs == jobs


def test_a_change_under_serve_trains_nothing() -> None:
    world = World()
    settle(world, MODELS[0])
    jobs = copy.deepcopy(world.jobs)
    settle(world, MODELS[1])
    assert world.jobs == jobs


def test_a_refused_candidate_leaves_the_old_revision_with_all_traffic() -> None:
    world = World()
    settle(world, MODELS[0])
    weights = dict(world.weights)
    world.measured = "bad"
    (refusal,) = settle(world, MODELS[2])
    assert isinstance(refusal, Refuse)
    assert refusal.reason == "GateFailed"
    assert world.weights == weights
    assert world.serving() == set(weights)
