"""The loss curve of a training run: one row a step, drawn in a terminal and as a picture.

A row is `{step, loss, tokens, trainedTokens, learningRate}`, with `validationLoss` where it was measured; losses are
nats a trained token. The train stage keeps all rows in its checkpoints and its artifact. While it runs, others see a
thinned curve, so that what is written every few seconds stays small however long the run is. The stage's log says some
rows in words: it can be read where the artifacts cannot.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

MOST_ROWS = 400
"""Rows of a thinned curve: more than a terminal or a picture has columns."""

_LOSS_AXIS = "loss, nats a token"


def thinned(rows: Sequence[Row], most: int = MOST_ROWS) -> list[Row]:
    """At most `most` rows over the whole run: the first, the last, those with a validation loss, and others between
    them at even distances."""
    if len(rows) <= most:
        return list(rows)
    measured = [index for index, row in enumerate(rows) if row.get("validationLoss") is not None]
    if len(measured) > most // 2:
        measured = [measured[i] for i in _evenly(len(measured), most // 2)]
    kept = {*measured, *_evenly(len(rows), most - len(measured))}
    return [rows[index] for index in sorted(kept)]


def dumped(rows: Sequence[Row]) -> bytes:
    """Rows as JSON, one a line. A number that is not finite is written as null: the text stays JSON."""
    return "".join(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n" for row in rows).encode()


def loaded(text: bytes) -> list[Row]:
    """Rows of a JSON-lines text. A last line that is torn is left out."""
    rows: list[Row] = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def told(row: Row, total: int) -> str:
    """A row in words, for a log. total: steps of the whole run."""
    beside = f", validation loss {row['validationLoss']:.6g}" if row.get("validationLoss") is not None else ""
    return f"step {row['step']} of {total}: loss {row['loss']:.6g}{beside}"


_TOLD = re.compile(r"\bstep (\d{1,15}) of \d+: loss (\S+?)(?:, validation loss (\S+))?$", re.MULTILINE)


def heard(log: str) -> list[Row]:
    """Rows that a log says in words, by step; what was said last of a step counts."""
    rows: dict[int, Row] = {}
    for step, *values in _TOLD.findall(log):
        try:
            losses = [_finite(float(value)) for value in values if value]
        except ValueError:
            continue
        rows[int(step)] = {"step": int(step), **dict(zip(("loss", "validationLoss"), losses, strict=False))}
    return [rows[step] for step in sorted(rows)]


def drawn(rows: Sequence[Row], title: str, width: int = 100, height: int = 24, colour: bool = False) -> str:
    """The curve as text for a terminal of `width` columns; without `colour` it holds no control codes.

    Where plotext is not installed, or there is nothing to draw, a few lines of figures instead.
    """
    losses, validation = points(rows, "loss"), points(rows, "validationLoss")
    try:
        plotext = importlib.import_module("plotext")
    except ImportError:
        plotext = None
    if plotext is None or not losses:
        return listed(rows, title)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(max(40, width), max(10, height))
    figure.title(title)
    figure.label("optimizer step", "x")
    figure.label(_LOSS_AXIS, "y")
    line = figure.signal([step for step, _ in losses], [loss for _, loss in losses])
    figure.draw((line.lines() if len(losses) > 1 else line).label("training"))
    if validation:
        steps, values = zip(*validation, strict=True)
        figure.draw(figure.signal(list(steps), list(values), marker="x").label("validation"))
    picture: str = figure.build().string(colorless=not colour)
    return "\n".join(text.rstrip() for text in picture.splitlines())


def listed(rows: Sequence[Row], title: str, most: int = 12) -> str:
    """The curve as figures, a line each."""
    if not rows:
        return f"{title}: no step is done yet"
    lines = [f"{title}: {_LOSS_AXIS}"]
    for row in thinned(rows, most):
        validation = row.get("validationLoss")
        beside = f"  validation {validation:.4f}" if isinstance(validation, int | float) else ""
        loss = row.get("loss")
        lines.append(f"step {row['step']:>7}  {'-' if loss is None else f'{loss:.4f}'}{beside}")
    return "\n".join(lines)


def write_picture(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Draw the curve into the PNG file `path`; False, with nothing written, where matplotlib is not installed or there
    is nothing to draw."""
    losses, validation = points(rows, "loss"), points(rows, "validationLoss")
    if not losses:
        return False
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    # The figure by itself, without pyplot: no window system is asked, and PNG is drawn by Agg.
    figure = figures.Figure(figsize=(8, 4.8), dpi=120, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True)
    marker = "o" if len(losses) == 1 else None
    axes.plot(steps, values, color="#1f77b4", linewidth=1.2, marker=marker, label="training loss")
    if validation:
        steps, values = zip(*validation, strict=True)
        axes.plot(steps, values, color="#d95f02", linewidth=1.2, marker="o", markersize=4, label="validation loss")
        best_step, best = min(validation, key=lambda point: point[1])
        early = best_step < losses[-1][0] / 3
        axes.annotate(
            f"lowest {best:.3f} at step {best_step}",
            (best_step, best),
            textcoords="offset points",
            xytext=(6 if early else -6, 14),
            ha="left" if early else "right",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.8},
        )
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per trained token)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})
    return True


def points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """`(step, value)` of the rows that hold a finite `name`."""
    return [(int(row["step"]), float(row[name])) for row in rows if _finite(row.get(name)) is not None]


def _evenly(count: int, most: int) -> list[int]:
    """`most` indices out of `count`, at even distances, the first and the last among them."""
    if most <= 1:
        return [count - 1][:most]
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
