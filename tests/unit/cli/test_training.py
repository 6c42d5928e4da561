"""What a person sees of a training run, from plain values alone."""

import io
from typing import Any

import pytest
from rich.console import Console

from fastserve.cli import render, show, training
from fastserve.cli.screen import _detail
from fastserve.errors import UsageInvalid

GIB = 2**30
METRICS: dict[str, Any] = {
    "loss": 2.3141,
    "learningRate": 1e-3,
    "tokensPerSecond": 1234.4,
    "validationLoss": 2.5,
    "proof": {"gradientError": 2.1e-7, "tolerance": 1e-6, "scope": "model", "collectives": 42},
    "plan": {"stepSeconds": 0.79, "measuredSeconds": 0.82, "error": -0.0366},
    "workers": [
        {
            "rank": 0,
            "profile": "old",
            "batchShare": 0.143,
            "stateShare": 0.0,
            "tokensPerSecond": 170.0,
            "memoryBytes": 1.5 * GIB,
            "plannedBytes": GIB,
            "keptBytes": 0,
            "plannedKeptBytes": 0,
            "idleShare": 0.04,
        },
        {
            "rank": 1,
            "profile": "new",
            "batchShare": 0.857,
            "stateShare": 1.0,
            "tokensPerSecond": 1064.4,
            "memoryBytes": 2 * GIB,
            "plannedBytes": 2 * GIB,
            "keptBytes": 102_000_000,
            "plannedKeptBytes": 100_000_000,
            "idleShare": 0.001,
        },
    ],
    "slow": {"rank": 0, "cause": "data", "share": 0.34},
    "replans": 2,
    "restarts": 1,
    "rows": {"read": 120, "used": 110, "truncated": 7, "leftOut": {"nothing is trained": 3}},
}


def test_each_worker_is_a_row_with_its_shares_speed_memory_and_idle_time() -> None:
    assert training.worker_rows(METRICS) == [
        ["0", "old", "14.3%", "0%", "170", "0 B", "1.5 GiB", "1 GiB (+50%)", "4%"],
        ["1", "new", "85.7%", "100%", "1064", "97.3 MiB (+2%)", "2 GiB", "2 GiB (+0%)", "0.1%"],
    ]
    assert all(len(row) == len(training.WORKER_COLUMNS) for row in training.worker_rows(METRICS))


def test_the_rest_is_a_sentence_each() -> None:
    assert training.sentences(METRICS) == [
        "loss: 2.314, validation 2.5, 1234 tokens/s",
        "proof before the first step: gradient of the whole model differs from one process by 2.1e-07, "
        "at most 1e-06 allowed; 42 exchanges in the same order on all ranks",
        "step time: 0.79 s predicted, 0.82 s measured (4% off)",
        "slow: rank 0, data: 34% of its time goes into waiting for rows",
        "batch shared anew 2 times; workers started anew once",
        "rows: 120 read, 110 used, 7 cut at maxLength, 3 left out (nothing is trained)",
    ]


def test_a_run_that_lends_machines_says_so_first() -> None:
    size = "training with 1 of 2 workers: training lends 1 machine of profile large to chat"
    assert training.sentences({**METRICS, "size": size}) == [size, *training.sentences(METRICS)]
    assert training.size_of({"size": ""}) == ""


def test_a_finished_run_shows_where_it_began_and_its_best_step() -> None:
    ended = {
        "firstLoss": 5.0,
        "finalLoss": 2.0,
        "validationLoss": 2.25,
        "bestStep": 40,
        "endedEarly": "validation has not improved since step 40",
        "workers": 1,
        "sharing": {"replans": 1, "restarts": 1, "lostSteps": 3, "workers": [{"rank": 0}]},
    }
    found = training.metrics_of({"state": "committed", "metrics": ended})
    assert training.sentences(found) == [
        "loss: 2 at the last step, 5 at the first, validation 2.25 at step 40, the lowest",
        "batch shared anew once; workers started anew once; 3 steps done again; "
        "ended early: validation has not improved since step 40",
    ]
    assert len(training.worker_rows(found)) == 1


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"workers": None, "slow": None, "plan": {}, "proof": None},
        {"workers": [{"rank": 0}]},
        {"workers": [{"rank": 0, "memoryBytes": None, "plannedBytes": 0, "idleShare": "?"}], "replans": 0},
        {"plan": {"stepSeconds": 1.0}},
        {"plan": {"stepSeconds": 1.0, "measuredSeconds": 0.0}},
        {"rows": {"read": 3}},
        {"rows": 3, "workers": 2, "loss": None},
    ],
)
def test_what_is_not_known_is_not_shown(metrics: dict[str, Any]) -> None:
    text = str([training.worker_rows(metrics), training.sentences(metrics), training.live_parts(metrics)])
    assert "None" not in text
    assert "nan" not in text


def test_up_shows_a_run_in_one_line() -> None:
    progress = {"done": 12, "total": 40, "unit": "steps", "ratePerSecond": 1.3, "note": "training", "metrics": METRICS}
    assert _detail(progress) == (
        "12/40 steps, 1.3 steps/s, loss 2.314, validation 2.5, 1234 tokens/s, 2 workers, rank 0 is slow (data), "
        "2 re-plans, 1 restart, training"
    )


def test_a_plot_needs_a_name() -> None:
    with pytest.raises(UsageInvalid, match="name it"):
        show.status(None, None, watch=False, as_json=False, plot=True)  # type: ignore[arg-type]


def test_a_table_of_workers_is_drawn_without_folding() -> None:
    file = io.StringIO()
    console = Console(file=file, width=160)
    render.table(training.WORKER_COLUMNS, training.worker_rows(METRICS), title="Workers", console=console)
    lines = file.getvalue().splitlines()
    assert lines[0].strip() == "Workers"
    assert lines[1].split() == list(training.WORKER_COLUMNS)
    assert len(lines) == 4
