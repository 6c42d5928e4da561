"""Whatever happened, looking again ends well: the planner in a small world in which everything goes wrong."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small_world import MEASURED, MODELS, PLAIN, STEPPED, World, look, settle

from fastserve.plan.keys import outside, stage_keys
from fastserve.plan.moves import Done, Refuse
from fastserve.plan.observed import AttemptState, Pin, RevisionState
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.steps import ROLLED_BACK

ENGINE_STATES = [RevisionState.READY, RevisionState.FAILED, RevisionState.STARTING]


class Serving(RuleBasedStateMachine):
    """What can happen to what serves, in any order; between events, the planner looks or does not."""

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

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0, -100.0]))
    def the_clock_moves(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: self.world.revisions)
    @rule(index=st.integers(0, 3), state=st.sampled_from(ENGINE_STATES))
    def an_engine_changes(self, index: int, state: RevisionState) -> None:
        """It comes up, fails for good, or dies and is being restarted."""
        digest = sorted(self.world.revisions)[index % len(self.world.revisions)]
        if self.world.revisions[digest] is not RevisionState.STOPPING:
            self.world.revisions[digest] = state

    @rule()
    def the_cluster_dies(self) -> None:
        self.world.revisions.clear()
        for job in self.world.newest(AttemptState.RUNNING):
            self.world.end(job, AttemptState.LOST)

        self.world.cluster_since = self.world.now

    @rule()
    def the_routes_are_lost(self) -> None:
        self.world.weights, self.world.shifted_at, self.world.proven = {}, None, None

    @rule(lost=st.booleans())
    def the_time_of_the_shift_is_wrong(self, lost: bool) -> None:
        self.world.shifted_at = None if lost else self.world.now + 1e6

    @rule()
    def the_gateway_starts_again(self) -> None:
        self.world.told_since, self.world.counted = self.world.now, {}

    @rule()
    def the_gateway_falls_silent(self) -> None:
        self.world.silent = True

    @rule(requests=st.sampled_from([1, 30, 500, 5000]), seconds=st.sampled_from([0.5, 5.0, 40.0]))
    def clients_ask(self, requests: int, seconds: float) -> None:
        self.world.now += seconds
        self.world.ask(requests)

    @precondition(lambda self: self.world.known)
    @rule(index=st.integers(0, 5), quality=st.sampled_from(["good", "fails", "slow"]))
    def a_revision_turns_out_to_be(self, index: int, quality: str) -> None:
        digest = sorted(self.world.known)[index % len(self.world.known)]
        self.world.quality[digest] = quality

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
        if self.world.pin is not None and self.world.pin.reason == ROLLED_BACK:
            self.world.pin = None

    @rule(index=st.sampled_from(STEPPED), quality=st.sampled_from(["good", "fails", "slow"]))
    def a_rollout_begins(self, index: int, quality: str) -> None:
        """A new revision with steps, as far as its first one, when all goes well."""
        self.model = MODELS[index]
        for _ in range(12):
            look(self.world, self.model)
            if len(self.world.weights) > 1:
                for digest in self.world.weights.keys() - {self.world.proven}:
                    self.world.quality[digest] = quality
                return
            self.world.go_well()

    @rule()
    def it_comes_to_rest(self) -> None:
        world, model = copy.deepcopy(self.world), self.model
        moves = settle(world, model)
        refusals = [move for move in moves if isinstance(move, Refuse)]
        assert len(world.weights) <= 1 or not world.serving(), "at rest, traffic is not shared"
        if refusals:
            assert all(move.reason and move.stage for move in refusals)
            if any(move.reason == ROLLED_BACK for move in refusals):
                assert world.pin is not None
                assert world.weights == {world.pin.revision: 100}
                assert world.pin.instead_of not in world.revisions
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


class AnyWorld(Serving):
    """And what can happen to manifests, sources and stages."""

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


class AnyRollout(Serving):
    """A model that serves, and manifests that change nothing but the revision and its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MODELS[PLAIN]
        settle(self.world, self.model)

    @rule(index=st.sampled_from([PLAIN, *STEPPED]))
    def the_manifest_changes(self, index: int) -> None:
        self.model = MODELS[index]


SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
AnyWorld.TestCase.settings = AnyRollout.TestCase.settings = SETTINGS
TestAnyWorld, TestAnyRollout = AnyWorld.TestCase, AnyRollout.TestCase


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


def at_first_step(index: int) -> tuple[World, str, str]:
    """A rollout that has just begun, with the digests of the old and the new revision."""
    world = World()
    settle(world, MODELS[PLAIN])
    (old,) = world.weights
    for _ in range(12):
        look(world, MODELS[index])
        if len(world.weights) > 1:
            (new,) = world.weights.keys() - {old}
            return world, old, new
        world.go_well()
    raise AssertionError("no rollout began")


@pytest.mark.parametrize("index", STEPPED[:2])
@pytest.mark.parametrize("quality", ["good", "fails", "slow"])
def test_a_good_revision_is_promoted_and_a_bad_one_rolled_back(index: int, quality: str) -> None:
    world, old, new = at_first_step(index)
    first = world.weights[new]
    world.quality[new] = quality
    (end,) = settle(world, MODELS[index])
    if quality == "good":
        assert isinstance(end, Done)
        assert world.weights == {new: 100}
        return
    assert isinstance(end, Refuse)
    assert (end.reason, world.weights) == (ROLLED_BACK, {old: 100})
    assert f"at {first} % of traffic" in end.because
    assert settle(world, MODELS[index]) == [end], "it is not tried again"
    world.pin, world.quality = None, {}
    settle(world, MODELS[index])
    assert world.weights == {new: 100}, "asked again, it is tried again"


@pytest.mark.parametrize("index", STEPPED)
@pytest.mark.parametrize("state", [RevisionState.STARTING, RevisionState.FAILED])
def test_a_revision_that_dies_during_a_step_is_rolled_back(index: int, state: RevisionState) -> None:
    world, old, new = at_first_step(index)
    world.now += 1
    world.revisions[new] = state
    (end,) = settle(world, MODELS[index])
    assert isinstance(end, Refuse)
    assert (end.reason, world.weights) == (ROLLED_BACK, {old: 100})


def test_a_hold_of_nothing_watches_nothing() -> None:
    world, _, new = at_first_step(STEPPED[2])
    world.quality[new] = "fails"
    settle(world, MODELS[STEPPED[2]])
    assert world.weights == {new: 100}


@pytest.mark.parametrize("index", STEPPED)
def test_a_rollout_goes_on_after_a_restart_of_everything(index: int) -> None:
    world, _, new = at_first_step(index)
    world.now += 5
    world.cluster_since = world.told_since = world.now
    world.counted.clear()
    world.revisions = dict.fromkeys(world.revisions, RevisionState.STARTING)
    (end,) = settle(world, MODELS[index])
    assert isinstance(end, Done)
    assert world.weights == {new: 100}
    assert world.pin is None
