"""The picture of the documentation: the loss of three unequal workers and of one process, step by step."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.bench.training_runs import Told


def draw(one: Told, several: Told, path: Path) -> bool:
    """Both curves and their difference as a PNG; False where matplotlib is not installed."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    figure = figures.Figure(figsize=(8, 5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [row.step for row in several.rows]
    above.plot(steps, [row.loss for row in one.rows], color="#1f77b4", linewidth=4, alpha=0.35, label="one process")
    above.plot(steps, [row.loss for row in several.rows], color="#c0392b", linewidth=1.2, label="three unequal workers")
    above.set_ylabel("loss (nats a token)")
    above.set_title("A small model learns a book from scratch")
    above.legend(frameon=False)
    apart = [max(abs(a.loss - b.loss), 1e-9) for a, b in zip(one.rows, several.rows, strict=True)]
    below.semilogy(steps, apart, color="#555555", linewidth=1)
    below.set_ylabel("difference")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
