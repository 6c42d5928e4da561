"""The compress stage: take a model, carry out the steps in order, hand the smaller model on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastserve.errors import DatasetInvalid, NotExecutable, Problem, SourceInvalid
from fastserve.spec.compress import CompressStep, Quantize
from fastserve.stages.compress import int8
from fastserve.stages.compress.calibration import calibration_rows
from fastserve.stages.work import Outcome, Work


def run(work: Work) -> Outcome:
    """Compress `model/` of the input artifact by the steps of `spec.compress`.

    Returns a folder with `model/` in Hugging Face layout, in compressed-tensors format, which vLLM loads as it is.

    Raises NotExecutable for a step that this version does not run, SourceInvalid for a model that is already
    quantised, DatasetInvalid for calibration rows that are missing or cannot be read.
    """
    steps = [CompressStep.model_validate(step) for step in work.request.section["steps"]]
    work.report.update(0, 1, "layers", note="reading the model")
    given = work.input("model") / "model"
    model, metrics = given, []
    began_at = time.monotonic()
    for index, step in enumerate(steps):
        target = work.scratch / f"step-{index}" / "model"
        metrics.append(_carry_out(work, step, index, model, target))
        model = target
    return Outcome(
        folder=model.parent,
        metrics={
            "bytesBefore": weight_bytes(given),
            "bytesAfter": weight_bytes(model),
            "method": metrics[-1]["method"],
            "calibrationRows": metrics[-1]["calibrationRows"],
            "calibrationTokens": metrics[-1]["calibrationTokens"],
            "quantisedLayers": metrics[-1]["quantisedLayers"],
            "seconds": round(time.monotonic() - began_at, 1),
        },
    )


def choose_method(wanted: str, has_rows: bool) -> int8.Method:
    """The method that `auto` stands for: gptq where there are rows to calibrate on, else roundToNearest.

    Raises DatasetInvalid for a method that needs rows where there are none.
    """
    if wanted == "auto":
        return "gptq" if has_rows else "roundToNearest"
    method: int8.Method = {"gptq": "gptq", "smoothquantGptq": "smoothquantGptq"}.get(wanted, "roundToNearest")  # type: ignore[assignment]
    if method != "roundToNearest" and not has_rows:
        raise DatasetInvalid(
            f"method: {wanted} calibrates on rows, but there are none; "
            "name them in quantize.calibration.data, or write method: roundToNearest"
        )
    return method


def require_unquantised(model: Path) -> None:
    """Raise SourceInvalid when the model's weights are already stored in fewer bits."""
    method = json.loads((model / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if method:
        raise SourceInvalid(
            f"the source is already quantised ({method.get('quant_method', 'unknown')}); "
            "remove spec.compress, or use the unquantised source"
        )


def weight_bytes(model: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _carry_out(work: Work, step: CompressStep, index: int, model: Path, target: Path) -> dict[str, Any]:
    quantize = step.quantize
    if quantize is None or quantize.format != "int8":
        what = "prune" if quantize is None else quantize.format
        problem = Problem(f"spec.compress[{index}]", f"{what} does not run yet; write quantize: {{format: int8}}")
        raise NotExecutable([problem])
    require_unquantised(model)
    method = choose_method(quantize.method, quantize.calibration.data is not None)
    rows = [] if method == "roundToNearest" else _rows(work, quantize, model)
    work.report.update(0, 1, "layers", note="loading the model", method=method, calibrationRows=len(rows))
    target.parent.mkdir(parents=True)
    layers = int8.quantize(model, target, method, rows, lambda done, total, note: _report(work, done, total, note))
    return {
        "method": method,
        "calibrationRows": len(rows),
        "calibrationTokens": sum(len(row) for row in rows),
        "quantisedLayers": layers,
    }


def _rows(work: Work, quantize: Quantize, model: Path) -> list[list[int]]:
    calibration = quantize.calibration
    if calibration.data is None:
        return []
    return calibration_rows(model, work.data(calibration.data), calibration.rows, calibration.max_length)


def _report(work: Work, done: int, total: int, note: str) -> None:
    work.report.update(done, total, "layers", note=note)
