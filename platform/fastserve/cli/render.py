"""Tables and sentences for people, JSON for machines. Data goes to stdout, all else to stderr; no colour unless a
terminal asks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastserve.errors import FastServeError, ManifestInvalid, NotExecutable, Problem
from fastserve.plan.gate import GateOutcome, Verdict
from fastserve.plan.memory import ByteTable
from fastserve.plan.sheet import Sheet
from fastserve.plan.training import TrainingPlan
from fastserve.telemetry.curve import drawn
from fastserve.units import show_bytes, show_duration, show_share

_PLAIN = bool(os.environ.get("NO_COLOR"))
_WIDE = 160
"""Columns of a table that goes into a file or a pipe, where nothing needs to be folded."""


def _console(file: TextIO) -> Console:
    return Console(file=file, no_color=_PLAIN, highlight=False, soft_wrap=True, width=None if file.isatty() else _WIDE)


out = _console(sys.stdout)
err = _console(sys.stderr)


def as_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def say(text: str, style: str = "") -> None:
    """A sentence on stderr: what happens."""
    err.print(escape(text), style=style or None)


def answer(text: str, end: str = "\n") -> None:
    """Data on stdout, as it is."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def problems_json(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as plain values."""
    return [
        {"path": p.path, "line": p.line, "problem": p.message, "suggestion": p.suggestion, "file": p.file}
        for p in problems
    ]


def error(problem: FastServeError, as_json_too: bool = False) -> None:
    """What went wrong, in the manifest's words; as JSON on stdout besides when asked."""
    if isinstance(problem, ManifestInvalid | NotExecutable):
        for item in problem.problems:
            err.print(f"[bold red]error[/]: {escape(str(item))}")
    else:
        err.print(f"[bold red]error[/]: {escape(str(problem))}")
    if as_json_too:
        listed = problem.problems if isinstance(problem, ManifestInvalid | NotExecutable) else ()
        as_json({"reason": problem.reason, "message": str(problem), "problems": problems_json(listed)})


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, console: Console | None = None
) -> None:
    """A plain table; numbers to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    (console or out).print(drawn)


def sheets(found: Sequence[Sheet], is_json: bool) -> None:
    """Show the plan of each model; as JSON one alone is no list."""
    if is_json:
        values = [item.to_json() for item in found]
        as_json(values[0] if len(values) == 1 else values)
        return
    for item in found:
        sheet(item)


def sheet(plan: Sheet, console: Console | None = None) -> None:
    """What `fastserve plan` shows: what will run, how long, how many bytes."""
    target = console or out
    target.print(f"[bold]Plan for {escape(plan.model)}[/]")
    table(
        ["STAGE", "STATE", "TIME", "KEY", "WHY"],
        [
            (
                s.stage,
                s.state,
                "" if not s.seconds else f"~{show_duration(s.seconds)}",
                (s.key or "")[:12],
                s.because,
            )
            for s in plan.stages
        ],
        console=target,
    )
    for data in plan.datasets:
        f = data.facts
        target.print(
            escape(
                f"{data.role}: {f.rows} rows, {f.used} used, {f.tokens} tokens, {f.trained_tokens} of them trained"
                + (f", {f.truncated} cut at maxLength" if f.truncated else "")
                + "".join(f", {count} left out ({cause})" for cause, count in f.left_out.items())
            )
        )
    if plan.training is not None:
        shares(plan.training, target)
    for bytes_table in plan.tables:
        table(
            ["WHAT", "BYTES", "FROM"],
            _byte_rows(bytes_table),
            title=bytes_table.title,
            console=target,
        )
    if plan.adapters:
        named = ", ".join(f"{line.name} (rank {line.facts.rank})" for line in plan.adapters)
        target.print(escape(f"adapters: {named}; the engine is started for ranks up to {plan.lora_rank}"))
    for warning in plan.warnings:
        target.print(f"[yellow]warning[/]: {escape(warning)}")


def _byte_rows(shown: ByteTable) -> list[tuple[str, str, str]]:
    rows = [(line.what, show_bytes(line.size_bytes), line.why) for line in shown.lines]
    there = f"of {show_bytes(shown.available_bytes)} there are"
    if shown.copies > 1:
        rows.append(("each", show_bytes(shown.copy_bytes), ""))
        return [*rows, (f"all {shown.copies}", show_bytes(shown.total_bytes), there)]
    return [*rows, ("total", show_bytes(shown.total_bytes), there)]


def shares(training: TrainingPlan, console: Console | None = None) -> None:
    """Who does what in training: equal neighbours share a line."""
    target = console or out
    plan = training.shares
    rows: list[list[str]] = []
    spans: list[tuple[int, int]] = []
    for index, worker in enumerate(plan.workers):
        row = [
            worker.profile,
            f"{worker.tokens_per_s:,.0f} {'given' if training.given[index] else 'assumed'}",
            show_share(plan.batch[index]),
            show_share(plan.state[index]),
            f"{plan.micro_tokens[index]:,}",
            show_bytes(plan.peak_bytes[index]),
            show_bytes(worker.memory_bytes),
        ]
        if rows and rows[-1] == row:
            spans[-1] = (spans[-1][0], index)
        else:
            rows.append(row)
            spans.append((index, index))
    names = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
    table(
        ["WORKER", "PROFILE", "TOKENS/S", "OF THE BATCH", "OF THE STATE", "TOKENS AT ONCE", "PEAK MEMORY", "OF"],
        [[name, *row] for name, row in zip(names, rows, strict=True)],
        title=f"Training on {len(plan.workers)} workers" if len(plan.workers) > 1 else "Training on one worker",
        console=target,
    )
    parts = f"{plan.micro_batches} micro-batches" if plan.micro_batches > 1 else "one micro-batch"
    step = f"A step of {plan.batch_tokens:,} tokens takes about {show_duration(plan.step_seconds)}"
    target.print(escape(f"{plan.because} {step}, in {parts}."))
    if not all(training.given) and len(plan.workers) > 1 and not plan.even:
        target.print("Assumed speeds are measured when the run starts, and the batch is then shared anew.")


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """The loss curve of a model, as wide as the terminal; plain text without colour in a file or a pipe."""
    width = out.width if out.is_terminal else 100
    title = f"loss of {name}"
    answer(drawn(rows, title, width=min(width, _WIDE), colour=out.is_terminal and not _PLAIN))


def comparison(metrics: Mapping[str, Any], verdict: Verdict, console: Console | None = None) -> None:
    """Parent against candidate, with the gate's verdict and its reasons."""
    target = console or out
    models: Mapping[str, Any] = metrics["models"]
    order = [role for role in ("source", "parent", "candidate") if role in models]
    names = {"source": "SOURCE", "parent": "PARENT", "candidate": "CANDIDATE"}
    rows: list[list[str]] = [
        ["size", *(show_bytes(models[role]["sizeBytes"]) for role in order)],
        ["held-out perplexity", *(f"{models[role]['perplexity']:.3f}" for role in order)],
    ]
    speeds = [models[role].get("tokensPerSecond") for role in order]
    rows.append(["tokens/s", *("-" if speed is None else f"{speed:.0f}" for speed in speeds)])
    table(
        ["", *(names[role] for role in order)],
        rows,
        title=f"Held-out rows: {metrics['rows']}, {metrics['tokens']} tokens",
        console=target,
    )
    if verdict.rows:
        rows = [[row.name, row.measured, row.limit, row.outcome.value] for row in verdict.rows]
        table(["GATE", "MEASURED (95 %)", "LIMIT", "VERDICT"], rows, console=target)
    colour = {GateOutcome.PASS: "green", GateOutcome.FAIL: "red", GateOutcome.INCONCLUSIVE: "yellow"}[verdict.outcome]
    target.print(f"gate: [bold {colour}]{verdict.outcome.value}[/]. {escape(' '.join(verdict.reasons))}")
