"""Runs of several real ranks: the losses of one process, whatever the shares, the interruptions and the re-plans."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tests.bench.cgroup import NoQuotas, Quotas
from tiny_llama import write_tiny_llama

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import fetch_checkpoint, newest_checkpoint
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.plan.stages import Stage
from fastserve.stages.train import pause, state, steps
from fastserve.stages.train.corpus import Corpus, Rectangle
from fastserve.stages.train.group import Group
from fastserve.stages.train.place import Place
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.start import start
from fastserve.stages.train.steps import Run
from fastserve.stages.train.task import Ended, Task
from fastserve.stages.train.worker import train

NewTask = Callable[..., Task]
UNEVEN = [{"profile": "local", "count": 1, "speed": speed} for speed in (1, 3, 6)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture
def new_store(tmp_path: Path) -> Callable[[], Store]:
    """Another empty store each time, so that runs of one key do not meet."""
    made: list[Path] = []

    def make() -> Store:
        made.append(tmp_path / f"other-{len(made)}")
        made[-1].mkdir()
        return open_store(str(made[-1]))

    return make


def losses(
    store: Store, task: Task, corpus: Corpus, model: Path, ranks: int, **more: Any
) -> tuple[list[Ended], list[dict[str, Any]]]:
    """How every rank ended, and the rows that the first one made."""
    attempts.claim(store, task.request)

    def rank() -> tuple[Ended, list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        ended = train(store, task, corpus, model, Group.current(), on_step=lambda row: rows.append(dict(row)), **more)
        return ended, rows

    found = run_ranks(rank, ranks)
    return [ended for ended, _ in found], found[0][1]


def news(store: Store, task: Task) -> dict[str, Any]:
    name = attempts.attempt_folder(task.request.stage, task.request.key, task.request.attempt) + "workers.json"
    metrics: dict[str, Any] = json.loads(store.read(name))["metrics"]
    return metrics


@pytest.mark.parametrize("section", [{"method": "full"}, {"method": "lora", "lora": {"rank": 4}}, {"packing": True}])
def test_three_unequal_ranks_have_the_losses_of_one_process(
    new_store: Callable[[], Store], tiny_model: Path, corpus: Corpus, new_task: NewTask, section: dict[str, Any]
) -> None:
    task = new_task(**{"method": "full", "steps": 8, "learningRate": 3e-3, "workers": UNEVEN, **section})
    _, one = losses(new_store(), task, corpus, tiny_model, 1)
    store = new_store()
    ended, three = losses(store, task, corpus, tiny_model, 3)
    assert ended == [Ended(8)] * 3
    assert [row["tokens"] for row in three] == [row["tokens"] for row in one]
    assert [row["loss"] for row in three] == pytest.approx([row["loss"] for row in one], abs=2e-6)
    told = news(store, task)
    assert told["proof"]["gradientError"] <= 2e-6
    assert [worker["rank"] for worker in told["workers"]] == [0, 1, 2]
    assert [worker["stateShare"] for worker in told["workers"]] == pytest.approx([0.1, 0.3, 0.6], abs=1e-4)
    for worker in told["workers"]:
        assert worker["keptBytes"] == pytest.approx(worker["plannedKeptBytes"], rel=0.02, abs=2048)


def test_fsdp2_on_equal_ranks_has_the_same_losses(
    new_store: Callable[[], Store], tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    task = new_task(method="full", steps=5, learningRate=3e-3, engine="fsdp2")
    _, one = losses(new_store(), new_task(method="full", steps=5, learningRate=3e-3), corpus, tiny_model, 1)
    store = new_store()
    ended, two = losses(store, task, corpus, tiny_model, 2)
    assert ended == [Ended(5)] * 2
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=2e-6)
    assert news(store, task)["proof"]["gradientError"] <= 2e-6
    alone, _ = losses(new_store(), task, corpus, tiny_model, 1)
    assert alone[0].reason == "NotExecutable"
    assert "engine: sharded" in alone[0].message


def test_a_rank_may_keep_nothing_and_another_may_compute_nothing(
    new_store: Callable[[], Store], tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    speeds = [{"profile": "local", "count": 1, "speed": speed} for speed in (1e-6, 1, 1)]
    task = new_task(method="full", steps=3, workers=speeds)
    _, one = losses(new_store(), task, corpus, tiny_model, 1)
    ended, three = losses(new_store(), task, corpus, tiny_model, 3)
    assert ended == [Ended(3)] * 3
    assert [row["loss"] for row in three] == pytest.approx([row["loss"] for row in one], abs=2e-6)


def test_a_run_goes_on_with_other_ranks_and_every_sample_is_seen_once(
    new_store: Callable[[], Store], tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    task = new_task(method="full", epochs=2, learningRate=3e-3, checkpoint={"everySteps": 3})
    _, calm = losses(new_store(), task, corpus, tiny_model, 1)
    store = new_store()
    attempts.claim(store, task.request)

    def killed(at_step: int) -> Callable[[], list[dict[str, Any]]]:
        def rank() -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = []

            def on_step(row: Mapping[str, Any]) -> None:
                rows.append(dict(row))
                if row["step"] == at_step:
                    saved(store, task, at_step - at_step % 3)  # the checkpoint before is on its way
                    raise Killed

            with contextlib.suppress(Killed):
                train(store, task, corpus, tiny_model, Group.current(), on_step=on_step)
            return rows

        return rank

    rows: dict[int, float] = {}
    redone: list[int] = []
    for ranks, at_step in ((3, 5), (2, 7), (4, 0)):
        made = run_ranks(killed(at_step), ranks)[0]
        for row in made:
            if row["step"] in rows:
                redone.append(row["step"])
                assert row["loss"] == pytest.approx(rows[row["step"]], abs=2e-6)
            rows[row["step"]] = row["loss"]
    assert list(rows.values()) == pytest.approx([row["loss"] for row in calm], abs=5e-6)
    assert redone
    assert len(redone) <= 2 * 3  # at most a checkpoint's interval for each of the two
    folder = fetch_checkpoint(store, Stage.TRAIN, task.request.key, task.total_steps, tmp_path / "last")
    curve = state.read_facts(folder).curve
    assert sum(row["tokens"] for row in curve) == 2 * int(sum(corpus.lengths))
    told = news(store, task)
    assert told["restarts"] == 2
    assert "proof" in told  # of the first start


def saved(store: Store, task: Task, step: int) -> None:
    """Wait for the checkpoint of a step: it is written beside the steps, and the disk may be busy."""
    end = time.monotonic() + 100
    while (newest_checkpoint(store, Stage.TRAIN, task.request.key) or 0) < step:
        assert time.monotonic() < end, f"the checkpoint of step {step} was not committed"
        time.sleep(0.01)


class Sleepy(Corpus):
    """Data that come slowly."""

    def rectangle(self, samples: Sequence[int]) -> Rectangle:
        time.sleep(0.02 * len(samples))
        return super().rectangle(samples)


def assembled(store: Store, task: Task, corpus: Corpus, model: Path, group: Group) -> Run:
    """A run that the test can look into."""
    saver = Saver(store, task.request, group, keep=1)
    return Run(store, task, corpus, None, group, start(store, task, corpus, model, group, Place()), saver)


def test_a_rank_whose_data_come_slowly_is_named_with_its_cause_and_gets_less(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    task = new_task(method="full", steps=12, batchTokens=1200)
    attempts.claim(store, task.request)

    def rank() -> Any:
        group = Group.current()
        mine = Sleepy(corpus.ids, corpus.trained, corpus.starts) if group.rank == 1 else corpus
        run = assembled(store, task, corpus, tiny_model, group)
        run.corpus = mine
        before = run.plan.batch
        ended = run.to_end(lambda row: None)
        run.saver.close()
        slow = run.meter.slow()
        return ended, before, run.plan.batch, None if slow is None else slow.to_json(), run.reports.replans

    for ended, before, after, slow, replans in run_ranks(rank, 3):
        assert ended == Ended(12)
        assert slow is not None
        assert (slow["rank"], slow["cause"]) == (1, "data")
        assert after[1] < before[1] / 2
        assert replans >= 1


def test_a_rank_that_is_cut_to_a_quarter_gets_less_within_five_steps_and_more_when_it_recovers(
    tmp_path: Path, corpus: Corpus, new_task: NewTask, missing: Callable[[str], None]
) -> None:
    # Large enough that a step takes many of the periods over which a quota holds.
    model = write_tiny_llama(tmp_path / "model", layers=4, hidden=128)
    task = new_task(method="full", steps=26, batchTokens=1400, workers=[{"profile": "local", "count": 2}])
    cut, restored = 8, 16

    def rank(quotas: Quotas, uri: str) -> Any:
        group = Group.current()
        quotas.join(f"rank{group.rank}")
        run = assembled(open_store(uri), task, corpus, model, group)
        shares: list[float] = []
        causes: list[Any] = []

        def on_step(row: Mapping[str, Any]) -> None:
            shares.append(run.plan.batch[1])
            slow = run.meter.slow()
            causes.append(None if slow is None else (slow.rank, slow.cause))
            if group.rank == 0 and row["step"] in (cut, restored):
                quotas.limit("rank1", 0.1 if row["step"] == cut else 0.4)

        run.to_end(on_step)
        run.saver.close()
        return shares, causes

    def follows(uri: str) -> bool:
        attempts.claim(open_store(uri), task.request)
        with Quotas() as quotas:
            for number in range(2):
                quotas.limit(f"rank{number}", 0.4)
            found = run_ranks(rank, 2, quotas, uri)
        assert found[0][0] == found[1][0]
        normal = found[0][0][cut - 1]
        return all(
            0.3 < normal < 0.7
            and min(shares[cut : cut + 6]) < 0.7 * normal
            and (1, "compute") in causes[cut : cut + 8]
            and max(shares[restored + 1 : restored + 9]) > 0.75 * normal
            for shares, causes in found
        )

    try:
        # Speeds are measured, and others on the machine may hold up one rank of a run; not every run.
        assert any(follows(str(tmp_path / f"store-{number}")) for number in range(4))
    except NoQuotas as error:
        missing(str(error))


def test_a_number_that_breaks_once_is_done_again_from_the_checkpoint(
    new_store: Callable[[], Store],
    tiny_model: Path,
    corpus: Corpus,
    new_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = new_task(method="full", steps=8, learningRate=3e-3, checkpoint={"everySteps": 3})
    _, calm = losses(new_store(), task, corpus, tiny_model, 1)
    broken: list[int] = []
    original = steps.loss_sum

    def once(model: torch.nn.Module, rectangle: Rectangle) -> torch.Tensor:
        loss = original(model, rectangle)
        broken.append(1)
        # In the fifth step of the second rank, and never again: a flipped bit.
        if len(broken) == 5 and Group.current().rank == 1:
            return loss * float("nan")
        return loss

    monkeypatch.setattr(steps, "loss_sum", once)
    ended, rows = losses(new_store(), task, corpus, tiny_model, 2)
    assert ended == [Ended(8)] * 2
    seen = [row["step"] for row in rows]
    assert sorted(set(seen)) == list(range(1, 9))
    assert len(seen) > 8  # some steps were done twice
    by_step = {row["step"]: row["loss"] for row in rows}
    assert [by_step[step] for step in range(1, 9)] == pytest.approx([row["loss"] for row in calm], abs=3e-6)


def test_a_number_that_breaks_again_ends_the_run_with_step_and_rank(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_task(method="full", steps=4, checkpoint={"everySteps": 2})
    original = steps.loss_sum
    monkeypatch.setattr(
        steps,
        "loss_sum",
        lambda model, rectangle: original(model, rectangle) * (float("inf") if Group.current().rank == 1 else 1.0),
    )
    ended, _ = losses(store, task, corpus, tiny_model, 2)
    assert [end.reason for end in ended] == ["StageFailed"] * 2
    assert "at step 1 on rank 1, again after the run went back" in ended[0].message
    assert "lower learningRate" in ended[0].message
    assert newest_checkpoint(store, Stage.TRAIN, task.request.key) is None


def test_fp16_finds_its_scale_and_loses_no_sample(
    new_store: Callable[[], Store], tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    task = new_task(method="full", precision="fp16", steps=6, learningRate=3e-3)
    exact = new_task(method="full", steps=6, learningRate=3e-3)
    _, fp32 = losses(new_store(), exact, corpus, tiny_model, 1)
    store = new_store()
    ended, rows = losses(store, task, corpus, tiny_model, 2)
    assert ended == [Ended(6)] * 2
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in fp32]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in fp32], abs=2e-2)
    folder = fetch_checkpoint(store, Stage.TRAIN, task.request.key, 6, tmp_path / "last")
    kept = state.read_facts(folder)
    assert 0 < kept.loss_scale <= 65536
    assert kept.extra["goodSteps"] <= 6


def test_validation_keeps_the_best_step_and_stops_when_nothing_improves(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    wanted = {"data": "held-out.jsonl", "everySteps": 2, "patience": 2}
    task = new_task(
        method="full",
        steps=60,
        learningRate=8e-2,  # far too high: it soon gets worse
        schedule="constant",
        validation=wanted,
        checkpoint={"everySteps": 50, "keep": 1},
    )
    held_out = corpus.rectangle([0])  # built here, so that its names are used
    assert held_out.ids_BL.shape[0] == 1
    ended, rows = losses(store, task, corpus, tiny_model, 2, held_out=corpus)
    assert all(end.early for end in ended)
    assert ended[0].step < 60
    measured = {row["step"]: row["validationLoss"] for row in rows if "validationLoss" in row}
    assert list(measured) == list(range(2, ended[0].step + 1, 2))
    best = min(measured, key=measured.__getitem__)
    assert ended[0].step == best + 4
    last = state.read_facts(fetch_checkpoint(store, Stage.TRAIN, task.request.key, ended[0].step, tmp_path / "last"))
    assert (last.best_step, last.best_loss) == (best, measured[best])
    assert f"since step {best}" in last.extra["ended"]
    # Its checkpoint outlives the newer ones.
    fetch_checkpoint(store, Stage.TRAIN, task.request.key, best, tmp_path / "best")
    # Taken up again, it is over at once.
    again, more = losses(store, task, corpus, tiny_model, 1, held_out=corpus)
    assert again == [Ended(ended[0].step, early=True)]
    assert more == []


def test_the_validation_loss_is_that_of_one_process(
    new_store: Callable[[], Store], tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    task = new_task(method="full", steps=4, workers=UNEVEN, validation={"data": "held-out.jsonl", "everySteps": 3})
    found = []
    for ranks in (1, 3):
        _, rows = losses(new_store(), task, corpus, tiny_model, ranks, held_out=corpus)
        found.append([row.get("validationLoss") for row in rows])
    assert [value is not None for value in found[0]] == [False, False, True, True]  # the last step is always measured
    assert found[1][2:] == pytest.approx(found[0][2:], abs=2e-6)


def test_a_notice_of_preemption_is_answered_with_a_checkpoint(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "NOTICE_EVERY_SECONDS", 0.0)
    task = new_task(method="full", steps=6, checkpoint={"everySteps": 100})
    asked: list[int] = []

    def notice() -> bool:
        asked.append(1)
        return len(asked) > 2  # from the third look on

    attempts.claim(store, task.request)

    def rank() -> list[int | None]:
        seen: list[int | None] = []

        def on_step(row: Mapping[str, Any]) -> None:
            if row["step"] > 4:
                saved(store, task, 3)
            seen.append(newest_checkpoint(store, Stage.TRAIN, task.request.key))

        train(store, task, corpus, tiny_model, Group.current(), on_step=on_step, notice=notice)
        return seen

    seen = run_ranks(rank, 2)[0]
    assert seen[2] is None
    assert seen[4] == 3  # once, not at every step
    assert seen[5] == 3


def test_a_run_that_is_paused_goes_on_with_other_ranks_and_nothing_is_done_twice(
    new_store: Callable[[], Store],
    tiny_model: Path,
    corpus: Corpus,
    new_task: NewTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = new_task(method="full", epochs=3, learningRate=3e-3, checkpoint={"everySteps": 100})
    _, calm = losses(new_store(), task, corpus, tiny_model, 1)
    store = new_store()
    attempts.claim(store, task.request)
    monkeypatch.setattr(pause, "EVERY_SECONDS", 0.01)
    rows: list[dict[str, Any]] = []
    for part, (ranks, stop_at) in enumerate(((3, 2), (1, 5), (2, 0)), 1):
        told = replace(task, part=part)

        def rank(told: Task = told, stop_at: int = stop_at) -> tuple[Ended, list[dict[str, Any]]]:
            seen: list[dict[str, Any]] = []
            group = Group.current()

            def on_step(row: Mapping[str, Any]) -> None:
                seen.append(dict(row))
                if row["step"] == stop_at and group.rank == 0:
                    pause.ask(store, told.request, told.part)
                time.sleep(0.02)

            # Ranks know at different times; they stop together.
            with pause.watched(store, told.request, told.part, first=group.rank == 0) as paused:
                return train(store, told, corpus, tiny_model, group, on_step=on_step, paused=paused), seen

        found = run_ranks(rank, ranks)
        assert len({ended for ended, _ in found}) == 1
        ended, made = found[0]
        assert ended.reason == (pause.PAUSED if stop_at else "")
        rows += made
        assert ended.step == rows[-1]["step"] == newest_checkpoint(store, Stage.TRAIN, task.request.key)
    assert [row["step"] for row in rows] == list(range(1, task.total_steps + 1))
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in calm]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in calm], abs=5e-6)
    assert (news(store, task)["restarts"], news(store, task)["lostSteps"]) == (2, 0)
