"""Eight-bit weights and activations (W8A8) through llm-compressor.

This module alone imports torch, transformers and llm-compressor, and only inside its functions, so that whoever looks
at the compress stage does not pay for them. llm-compressor's own bars and log lines are kept out of the stage's log:
progress goes to whoever passed `progress`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Method = Literal["roundToNearest", "gptq", "smoothquantGptq"]
Progress = Callable[[int, int, str], None]
"""Called with layers done, layers in all, and what is being done."""

SMOOTHING_STRENGTH = 0.7
"""How much of the activations' range moves into the weights: alpha in the paper, which found 0.5 to 0.8 good."""

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")
IGNORED = ["lm_head"]
"""Layers that stay as they are: the head is usually tied to the embedding, and its rounding hits every token."""


def quantize(
    model: Path,
    target: Path,
    method: Method,
    calibration: Sequence[Sequence[int]],
    progress: Progress,
    smoothing_strength: float = SMOOTHING_STRENGTH,
) -> int:
    """Write an int8 copy of the Hugging Face folder `model` to `target`, in compressed-tensors format.

    Weights get one scale an output channel, activations one scale a token, measured as they pass (dynamic).
    calibration: token ids, one list a row; used by gptq (Frantar et al., 2022, arXiv 2210.17323) and
    smoothquantGptq (Xiao et al., 2022, arXiv 2211.10438, before gptq), not by roundToNearest.
    Every file but the weights and config.json is copied as it is: tokenizer, chat template and stop tokens are the
    input's own. Returns the number of layers that were quantised.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Hessians are accumulated in float32 whatever the weights are, so the input's own precision is kept.
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    passes = {"roundToNearest": 0, "gptq": 1, "smoothquantGptq": 2}[method]
    steps = _Steps(total=max(1, passes * (network.config.num_hidden_layers + 1)), progress=progress)
    arguments: dict[str, Any] = {}
    if method != "roundToNearest":
        arguments = {
            "dataset": _dataset(calibration),
            "num_calibration_samples": len(calibration),
            "max_seq_length": max(len(row) for row in calibration),
            "shuffle_calibration_samples": False,
        }
    oneshot(
        model=network,
        recipe=_recipe(method, steps, smoothing_strength),
        tokenizer=AutoTokenizer.from_pretrained(model, local_files_only=True),
        clear_sparse_session=True,
        **arguments,
    )
    steps.say("writing")
    network.save_pretrained(target, save_compressed=True, max_shard_size="5GB")
    (target / "recipe.yaml").unlink(missing_ok=True)
    copy_companions(model, target)
    for weights in target.glob("*.safetensors"):
        weights.chmod(0o644)  # the library writes them for the owner alone; serving may run as somebody else
    return sum(1 for name, _ in network.named_parameters() if name.endswith("weight_scale"))


def copy_companions(model: Path, target: Path) -> None:
    """Copy all that is neither weights nor config.json, over whatever the library wrote in its place."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)


class _Steps:
    """Counts layers over all passes."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def say(self, note: str) -> None:
        """Report without counting."""
        self._progress(self._done, self._total, note)

    def advance(self, note: str) -> None:
        """Count one layer."""
        self._done = min(self._done + 1, self._total)
        self.say(note)


def _recipe(method: Method, steps: _Steps, smoothing_strength: float) -> list[Any]:
    """Modifiers of llm-compressor that report each layer they have finished."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    scheme: dict[str, Any] = {"targets": "Linear", "scheme": "W8A8", "ignore": IGNORED}
    if method == "roundToNearest":
        return [_reporting(QuantizationModifier, steps, "rounding")(**scheme)]
    gptq = _reporting(GPTQModifier, steps, "gptq")(**scheme)
    if method == "gptq":
        return [gptq]
    return [_reporting(SmoothQuantModifier, steps, "smoothing")(smoothing_strength=smoothing_strength), gptq]


def _reporting(modifier: Any, steps: _Steps, note: str) -> Any:
    """A modifier class that counts one step each time a layer is done."""

    class Reporting(modifier):  # type: ignore[misc]
        def on_sequential_epoch_end(self, *arguments: Any, **named: Any) -> None:
            super().on_sequential_epoch_end(*arguments, **named)
            steps.advance(note)

    Reporting.__name__ = modifier.__name__  # the library infers the kind of pass from what the class declares and says
    return Reporting


def _dataset(calibration: Sequence[Sequence[int]]) -> Dataset:
    """Token rows as the data set that llm-compressor takes without tokenizing again."""
    from datasets import Dataset

    rows = [list(row) for row in calibration]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def _quiet() -> None:
    """Errors only (its metrics have a level of their own above warnings), and no log file in the working folder."""
    from llmcompressor.logger import LoggerConfig, configure_logger

    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"
    os.environ.pop("LLM_COMPRESSOR_LOG_FILE_LEVEL", None)
    configure_logger(LoggerConfig(console_log_level="ERROR", log_file=None, log_file_level=None))
    for noisy in ("datasets", "transformers", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
