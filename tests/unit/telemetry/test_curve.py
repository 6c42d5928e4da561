"""The loss curve: small while it runs, whole afterwards, drawn for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.telemetry import curve


def rows(count: int, every: int = 0) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        row = {"step": step, "loss": 6 * 0.99**step + 2, "tokens": 100, "trainedTokens": 90, "learningRate": 1e-3}
        if every and step % every == 0:
            row["validationLoss"] = 6 * 0.99**step + 2.2
        made.append(row)
    return made


def test_a_short_curve_is_kept_whole() -> None:
    assert curve.thinned(rows(400)) == rows(400)


@pytest.mark.parametrize("every", [0, 1, 7, 100, 5000])
def test_a_long_curve_keeps_its_ends_and_its_validation(every: int) -> None:
    made = rows(10_000, every)
    kept = curve.thinned(made)
    assert len(kept) <= curve.MOST_ROWS
    assert len(kept) >= curve.MOST_ROWS // 2
    assert (kept[0], kept[-1]) == (made[0], made[-1])
    steps = [row["step"] for row in kept]
    assert steps == sorted(set(steps))
    if every >= 100:
        assert {s for s, _ in curve.points(kept, "validationLoss")} == {
            s for s, _ in curve.points(made, "validationLoss")
        }


def test_what_is_written_is_read_again_and_stays_json() -> None:
    made = rows(5, 2)
    assert curve.loaded(curve.dumped(made)) == made
    broken = [*made, {"step": 6, "loss": math.nan}]
    text = curve.dumped(broken)
    assert [json.loads(line) for line in text.splitlines()][-1] == {"step": 6, "loss": None}
    assert curve.points(curve.loaded(text), "loss")[-1][0] == 5


def test_a_torn_last_line_is_left_out() -> None:
    assert curve.loaded(curve.dumped(rows(3))[:-9]) == rows(2)
    assert curve.loaded(b"") == []


def test_a_terminal_shows_both_losses_with_units() -> None:
    shown = curve.drawn(rows(200, 20), "loss of m", width=70, height=18)
    for word in ("loss of m", "training", "validation", "optimizer step", "nats a token", "7.9"):
        assert word in shown
    assert "\x1b" not in shown
    assert all(len(line) <= 70 for line in shown.splitlines())
    assert "\x1b" in curve.drawn(rows(200), "loss of m", colour=True)


def test_one_step_can_be_drawn() -> None:
    assert "training" in curve.drawn(rows(1), "m")


def test_without_a_step_it_says_so() -> None:
    assert curve.drawn([], "loss of m") == "loss of m: no step is done yet"


def test_figures_stand_in_for_a_picture() -> None:
    shown = curve.listed(rows(1000, 100), "m", most=30).splitlines()
    assert shown[0] == "m: loss, nats a token"
    assert shown[1].split()[:2] == ["step", "1"]
    assert shown[-1].split() == ["step", "1000", "2.0003", "validation", "2.2003"]
    assert len(shown) <= 31


@pytest.mark.parametrize("every", [0, 10])
def test_the_picture_is_a_light_png(tmp_path: Path, every: int) -> None:
    target = tmp_path / "curve.png"
    assert curve.write_picture(rows(100, every), target, "m")
    assert target.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    image = imread(target)
    assert image.shape[:2] == (576, 960)
    assert image[2, 2, :3].min() == 1.0


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    assert not curve.write_picture([], tmp_path / "curve.png", "m")
    assert not (tmp_path / "curve.png").exists()


finite = st.floats(1e-6, 1e6)
SAID = st.lists(
    st.tuples(st.integers(0, 10**9), finite, st.none() | finite), max_size=30, unique_by=lambda item: item[0]
)


@given(
    SAID, st.text(alphabet=st.characters(exclude_characters="\n\r", exclude_categories=("Zl", "Zp", "Cc")), max_size=40)
)
def test_what_a_log_says_of_the_curve_is_heard_again(said: list[tuple[int, float, float | None]], noise: str) -> None:
    lines, wanted = [], []
    for step, loss, validation in said:
        row = {"step": step, "loss": loss, **({} if validation is None else {"validationLoss": validation})}
        lines += [f"2027-01-02 03:04:05,678 INFO fastserve.stages.train.news: {curve.told(row, 10**9)}", f"({noise})"]
        wanted.append(row)
    heard = curve.heard("\n".join(lines))
    assert [row["step"] for row in heard] == sorted(row["step"] for row in wanted)
    for row, again in zip(sorted(wanted, key=lambda row: row["step"]), heard, strict=True):
        assert again.keys() == row.keys()
        assert all(again[key] == pytest.approx(row[key], rel=1e-5) for key in row)


def test_the_last_word_on_a_step_counts_and_what_is_no_number_is_left_out() -> None:
    log = "step 3 of 9: loss 4.5\nstep 2 of 9: loss nan\nstep 3 of 9: loss 4.25, validation loss 5\nstep 4 of 9: loss x"
    assert curve.heard(log) == [{"step": 2, "loss": None}, {"step": 3, "loss": 4.25, "validationLoss": 5.0}]
    assert curve.heard("") == []
