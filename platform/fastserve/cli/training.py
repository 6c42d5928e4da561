"""What a person sees of a training run: one line while `up` works, a table of the workers in `status`.

Everything comes from the train stage's metrics, in which the same values stand for machines. A run of an older version,
or one that has just begun, lacks some of them; what is not there is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from fastserve.units import show_bytes, show_duration, show_share

Metrics = Mapping[str, Any]

WORKER_COLUMNS = ("RANK", "PROFILE", "BATCH", "STATE", "TOKENS/S", "KEPT", "MEMORY", "PLANNED", "IDLE")

_CAUSES = {
    "compute": "{share} of its speed is lost",
    "data": "{share} of its time goes into waiting for rows",
    "network": "{share} of a step is spent on what its link carries",
}


def metrics_of(stage: Metrics) -> Metrics:
    """The metrics of a train stage as it stands in a status, running or committed, on one level."""
    found = _mapping(_mapping(stage.get("progress")).get("metrics")) or _mapping(stage.get("metrics"))
    # The record counts its workers under the name under which `sharing` lists them.
    return {**found, **_mapping(found.get("sharing"))}


def live_parts(metrics: Metrics) -> list[str]:
    """The run in a few words, for one line: loss, speed, workers, and what is out of the ordinary."""
    parts = []
    for name, shown in (("loss", "loss"), ("validationLoss", "validation")):
        if _number(metrics.get(name)):
            parts.append(f"{shown} {metrics[name]:.4g}")
    if _number(metrics.get("tokensPerSecond")):
        parts.append(f"{metrics['tokensPerSecond']:.0f} tokens/s")
    workers = _list(metrics.get("workers"))
    if len(workers) > 1:
        parts.append(f"{len(workers)} workers")
    slow = _mapping(metrics.get("slow"))
    if slow:
        parts.append(f"rank {slow.get('rank')} is slow ({slow.get('cause')})")
    parts.extend(
        f"{metrics[name]} {word}{'' if metrics[name] == 1 else 's'}"
        for name, word in (("replans", "re-plan"), ("restarts", "restart"))
        if _number(metrics.get(name)) and metrics[name]
    )
    return parts


def worker_rows(metrics: Metrics) -> list[list[str]]:
    """Cells of the workers' table, in the order of WORKER_COLUMNS; empty when nothing is known of the workers."""
    rows = []
    for worker in map(_mapping, _list(metrics.get("workers"))):
        memory, planned = worker.get("memoryBytes"), worker.get("plannedBytes")
        rows.append(
            [
                str(worker.get("rank", "-")),
                str(worker.get("profile") or "-"),
                _percent(worker.get("batchShare")),
                _percent(worker.get("stateShare")),
                f"{worker['tokensPerSecond']:.0f}" if _number(worker.get("tokensPerSecond")) else "-",
                _against(worker.get("keptBytes"), worker.get("plannedKeptBytes")),
                show_bytes(int(memory)) if _number(memory) else "-",
                _planned(memory, planned),
                _percent(worker.get("idleShare")),
            ]
        )
    return rows


def sentences(metrics: Metrics) -> list[str]:
    """What else is known of the run, a line each."""
    found = [
        size_of(metrics),
        _loss(metrics),
        _proof(_mapping(metrics.get("proof"))),
        _step_time(_mapping(metrics.get("plan"))),
        _slow(_mapping(metrics.get("slow"))),
        _changes(metrics),
        _rows(_mapping(metrics.get("rows"))),
    ]
    return [sentence for sentence in found if sentence]


def size_of(metrics: Metrics) -> str:
    """Why the run has fewer workers than its manifest lists; empty when it has them all."""
    return str(metrics.get("size") or "")


def _loss(metrics: Metrics) -> str:
    parts = []
    if _number(metrics.get("firstLoss")) and _number(metrics.get("finalLoss")):
        parts.append(f"{metrics['finalLoss']:.4g} at the last step, {metrics['firstLoss']:.4g} at the first")
    elif _number(metrics.get("loss")):
        parts.append(f"{metrics['loss']:.4g}")
    if _number(metrics.get("validationLoss")):
        best = f" at step {metrics['bestStep']}, the lowest" if _number(metrics.get("bestStep")) else ""
        parts.append(f"validation {metrics['validationLoss']:.4g}{best}")
    if _number(metrics.get("tokensPerSecond")):
        parts.append(f"{metrics['tokensPerSecond']:.0f} tokens/s")
    return f"loss: {', '.join(parts)}" if parts else ""


def _proof(proof: Metrics) -> str:
    error, tolerance = proof.get("gradientError"), proof.get("tolerance")
    if not _number(error):
        return ""
    limit = f", at most {tolerance:.0e} allowed" if _number(tolerance) else ""
    scope = {"model": "of the whole model", "blocks": "of the first, the middle and the last block"}.get(
        str(proof.get("scope")), ""
    )
    text = f"proof before the first step: gradient {scope}".rstrip()
    text += f" differs from one process by {error:.1e}{limit}"
    if _number(proof.get("collectives")):
        text += f"; {proof['collectives']} exchanges in the same order on all ranks"
    return text


def _step_time(plan: Metrics) -> str:
    predicted, measured, error = plan.get("stepSeconds"), plan.get("measuredSeconds"), plan.get("error")
    if not _number(predicted):
        return ""
    if not _number(measured):
        return f"step time: {_seconds(predicted)} predicted"
    if not _number(error) and measured:
        error = (predicted - measured) / measured
    off = f" ({abs(error):.0%} off)" if _number(error) else ""
    return f"step time: {_seconds(predicted)} predicted, {_seconds(measured)} measured{off}"


def _slow(slow: Metrics) -> str:
    if not slow:
        return ""
    cause, share = str(slow.get("cause")), slow.get("share")
    how = _CAUSES.get(cause, "") if _number(share) else ""
    return f"slow: rank {slow.get('rank')}, {cause}" + (f": {how.format(share=f'{share:.0%}')}" if how else "")


def _changes(metrics: Metrics) -> str:
    parts = []
    if _number(metrics.get("replans")) and metrics["replans"]:
        parts.append(f"batch shared anew {_times(metrics['replans'])}")
    if _number(metrics.get("restarts")) and metrics["restarts"]:
        parts.append(f"workers started anew {_times(metrics['restarts'])}")
    if _number(metrics.get("lostSteps")) and metrics["lostSteps"]:
        parts.append(f"{metrics['lostSteps']} step{'s' if metrics['lostSteps'] != 1 else ''} done again")
    if metrics.get("endedEarly"):
        parts.append(f"ended early: {metrics['endedEarly']}")
    return "; ".join(parts)


def _rows(rows: Metrics) -> str:
    if not _number(rows.get("read")):
        return ""
    parts = [f"{rows['read']} read", f"{rows.get('used', '-')} used"]
    if rows.get("truncated"):
        parts.append(f"{rows['truncated']} cut at maxLength")
    parts.extend(f"{count} left out ({cause})" for cause, count in _mapping(rows.get("leftOut")).items() if count)
    return f"rows: {', '.join(parts)}"


def _against(value: Any, planned: Any) -> str:
    if not _number(value):
        return "-"
    off = f" ({value / planned - 1:+.0%})" if _number(planned) and planned else ""
    return show_bytes(int(value)) + off


def _planned(memory: Any, planned: Any) -> str:
    if not _number(planned):
        return "-"
    shown = show_bytes(int(planned))
    return f"{shown} ({memory / planned - 1:+.0%})" if _number(memory) and planned else shown


def _percent(share: Any) -> str:
    return show_share(share) if _number(share) else "-"


def _seconds(seconds: float) -> str:
    """Step times are short, and a tenth of one matters."""
    return f"{seconds:.3g} s" if seconds < 60 else show_duration(seconds)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _mapping(value: Any) -> Metrics:
    return value if isinstance(value, Mapping) else {}
