"""What `fastserve up` shows while it works: one live bar a stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fastserve.cli import render, training
from fastserve.plan.time import ENGINE_SECONDS
from fastserve.units import show_duration

LINE_EVERY_SECONDS = 10.0


class Screen:
    """Shows the status of models as it changes."""

    def __init__(self, quiet: bool = False) -> None:
        self._live = render.err.is_terminal and not quiet
        self._quiet = quiet
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._said: dict[tuple[str, str], tuple[str, float]] = {}
        self._began: dict[tuple[str, str], float] = {}
        self._progress = Progress(
            TextColumn("{task.fields[stage]:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            console=render.err,
            transient=False,
        )

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One sentence above the bars."""
        if self._quiet:
            return
        if self._live:
            self._progress.console.print(escape(text), style="dim")
        else:
            render.say(text)

    def show(self, status: Mapping[str, Any]) -> None:
        """Bring the bars of one model up to date."""
        if self._quiet:
            return
        for stage, state in status["stages"].items():
            if state["state"] == "running":
                self._running(status["name"], stage, state.get("progress") or {})
            elif (status["name"], stage) in self._began and state["state"] == "committed":
                self._finished(status["name"], stage)
        self._engine(status["name"], status["revisions"])

    def _engine(self, model: str, revisions: Sequence[Mapping[str, Any]]) -> None:
        """The start of an engine, which tells no numbers: its bar goes by the time that a start usually takes."""
        began = self._began.get((model, "serve"))
        if any(revision["state"] == "starting" for revision in revisions):
            seconds = round(time.monotonic() - began) if began is not None else 0
            left = max(0, ENGINE_SECONDS - seconds)
            progress = {
                "done": min(seconds, ENGINE_SECONDS - 1),
                "total": ENGINE_SECONDS,
                "unit": "s",
                "etaSeconds": left,
            }
            note = f"{seconds} s so far, longer than usual" if left == 0 else "the engine starts, by the usual time"
            self._running(model, "serve", {**progress, "note": note})
        elif began is not None and any(revision["state"] == "ready" for revision in revisions):
            self._finished(model, "serve")

    def _running(self, model: str, stage: str, progress: Mapping[str, Any]) -> None:
        self._began.setdefault((model, stage), time.monotonic())
        total = progress.get("total") or 1
        done = progress.get("done") or 0
        detail = _detail(progress)
        if self._live:
            bar = self._bars.get((model, stage))
            if bar is None:
                bar = self._bars[model, stage] = self._progress.add_task(
                    "", total=total, stage=stage, detail="starting"
                )
            self._progress.update(bar, completed=done, total=total, detail=escape(detail or "starting"))
            return
        _, at = self._said.get((model, stage), ("", 0.0))
        if time.monotonic() - at >= LINE_EVERY_SECONDS:
            self._said[model, stage] = (detail, time.monotonic())
            render.say(f"{stage}: {100 * done / total:.0f}% {detail or 'starting'}")

    def _finished(self, model: str, stage: str) -> None:
        took = show_duration(time.monotonic() - self._began.pop((model, stage)))
        bar = self._bars.pop((model, stage), None)
        if self._live and bar is not None:
            self._progress.update(bar, completed=1, total=1, detail=f"done in {took}")
        elif not self._live:
            render.say(f"{stage}: done in {took}")


def _detail(progress: Mapping[str, Any]) -> str:
    """`12/40 steps, 1.3 steps/s, 21s left, loss 2.31, 400 tokens/s, training`."""
    if not progress:
        return ""
    unit = progress.get("unit", "")
    parts = [f"{progress['done']:g}/{progress['total']:g} {unit}".strip()]
    if progress.get("ratePerSecond"):
        rate = progress["ratePerSecond"]
        parts.append(f"{rate:.3g} {unit}/s" if rate >= 0.1 else f"{1 / rate:.3g} s each")
    if progress.get("etaSeconds") is not None:
        parts.append(f"{show_duration(progress['etaSeconds'])} left")
    metrics = progress.get("metrics") or {}
    if "loss" in metrics:
        parts.extend(training.live_parts(metrics))
    else:
        parts.extend(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
    if progress.get("note"):
        parts.append(str(progress["note"]))
    return ", ".join(parts)
