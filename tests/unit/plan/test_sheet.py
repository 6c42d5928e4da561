from __future__ import annotations

import json

import pytest

from fastserve.plan.facts import DatasetFacts, Hardware
from fastserve.plan.keys import outside, stage_keys
from fastserve.plan.memory import serving_memory
from fastserve.plan.observed import Attempt, AttemptState, Committed, Observed
from fastserve.plan.sheet import DatasetLine, Sheet, stage_lines
from fastserve.plan.stages import Stage
from fastserve.plan.time import estimate, total_text, training_tokens
from fastserve.plan.training import plan_training

ROWS = DatasetFacts(rows=100, used=98, left_out={"empty": 2}, truncated=1, tokens=20_000, trained_tokens=9_000)


def seen(model, stages=(), **rest):
    digests = {item.ident: "d" for item in outside(model)}
    keys = stage_keys(model, digests)
    return Observed(digests, {keys[stage]: Committed(stage, keys[stage], "bytes", 1) for stage in stages}, **rest)


def test_committed_stages_take_no_time(model, all_stages, smol, laptop):
    full = model(**all_stages)
    found = estimate(full, smol, ROWS, laptop, {Stage.SOURCE, Stage.TRAIN})
    assert [item.stage for item in found] == ["source", "train", "compress", "evaluate", "serve"]
    assert [item.seconds for item in found[:2]] == [0.0, 0.0]
    assert all(item.seconds > 0 for item in found[2:])
    assert total_text(found).startswith("~")


def test_time_grows_with_work_and_shrinks_with_cores(model, all_stages, smol, laptop):
    def train_seconds(hardware, rows=ROWS, **settings):
        spec = all_stages | {"train": all_stages["train"] | settings}
        return estimate(model(**spec), smol, rows, hardware, ())[1].seconds

    assert train_seconds(laptop, epochs=2) > train_seconds(laptop)
    assert train_seconds(laptop, method="full") > train_seconds(laptop)
    assert train_seconds(laptop, precision="fp32") > train_seconds(laptop)
    assert train_seconds(Hardware(cpus=16, memory_bytes=2**35)) < train_seconds(laptop)
    card = Hardware(cpus=16, memory_bytes=2**35, accelerators=1, accelerator_memory_bytes=2**35)
    assert train_seconds(card) < train_seconds(laptop)


def test_training_takes_its_steps_on_the_workers_that_share_it(model, smol, laptop):
    def seconds(speed):
        workers = [{"profile": "local", "count": 1, "speed": speed}, {"profile": "local", "count": 1}]
        found = model(train={"dataset": "file:///d", "batchTokens": 2000, "epochs": 2, "workers": workers})
        shares = plan_training(smol, found.spec.train, laptop).shares
        line = estimate(found, smol, ROWS, laptop, (), shares)[1]
        assert "20 steps of" in line.why
        assert "on 2 workers" in line.why
        return line.seconds, shares.step_seconds

    (even, step), (uneven, other_step) = seconds(1), seconds(3)
    assert even == pytest.approx(30 + 20 * step)
    # Speeds say who of them does what, and not how fast the machine is.
    assert (uneven, other_step) == pytest.approx((even, step))


def test_steps_count_their_batches(model):
    assert training_tokens(model(train={"dataset": "file:///d", "steps": 5, "batchTokens": 1000}), ROWS) == 5000
    assert training_tokens(model(train={"dataset": "file:///d", "epochs": 1.5}), ROWS) == 30_000
    assert training_tokens(model(), ROWS) == 0


def test_rounding_to_nearest_is_quick(model, smol, laptop):
    def seconds(**settings):
        spec = {"compress": [{"quantize": {"format": "int8", **settings}}]}
        return estimate(model(**spec), smol, None, laptop, ())[1].seconds

    assert seconds() == seconds(method="roundToNearest") < seconds(calibration={"data": "file:///rows"})


def test_each_stage_says_how_it_stands(model, all_stages):
    full = model(**all_stages)
    keys = stage_keys(full, seen(full).digests)
    running = {keys[Stage.TRAIN]: Attempt(1, AttemptState.RUNNING)}
    states = {line.stage: line.state for line in stage_lines(full, seen(full, [Stage.SOURCE], attempts=running))}
    assert states == {
        "source": "committed",
        "train": "running",
        "compress": "will run",
        "evaluate": "will run",
        "serve": "will run",
    }
    gone = stage_lines(full, seen(full, [Stage.COMPRESS, Stage.EVALUATE]))
    assert [line.state for line in gone] == ["not needed", "not needed", "committed", "committed", "will run"]


def test_a_stage_with_an_unresolved_source_says_so(model, all_stages):
    lines = stage_lines(model(**all_stages), Observed(digests={"file:///models/base": "d"}))
    assert [line.state for line in lines] == ["will run", "unresolved", "unresolved", "unresolved", "will run"]


def test_the_whole_sheet_is_plain_json(model, all_stages, smol, laptop):
    full = model(**all_stages)
    sheet = Sheet(
        model="chat",
        stages=stage_lines(full, seen(full), estimate(full, smol, ROWS, laptop, ())),
        datasets=(DatasetLine("train.dataset", ROWS),),
        tables=(serving_memory(smol, full.spec.serve, smol.weight_bytes, laptop),),
        training=plan_training(smol, full.spec.train, laptop),
        warnings=("end token put right",),
    )
    plain = json.loads(json.dumps(sheet.to_json(), allow_nan=False))
    assert plain["datasets"][0]["leftOut"] == {"empty": 2}
    assert plain["memory"][0]["totalBytes"] == sum(line["bytes"] for line in plain["memory"][0]["lines"])
    assert plain["seconds"] == sum(line["seconds"] for line in plain["stages"])
    assert plain["refusals"] == []
    assert plain["training"]["workers"][0]["batchShare"] == 1
    assert Sheet("chat", ()).to_json()["training"] is None
