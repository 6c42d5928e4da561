"""A model from scratch: a folder with its configuration and its tokenizer, before it has any weights.

The stage's own process makes it once. Rows are tokenised with it, the export copies it, and the workers get nothing of
it but the configuration: their weights follow from that and `train.seed` alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fastserve.artifacts.describe import describe_new
from fastserve.artifacts.model_config import overridden, whole
from fastserve.artifacts.tokenizer import TokenizerFiles, from_folder, load_tokenizer, stop_set, write_tokenizer
from fastserve.data.template import turn_end
from fastserve.data.vocabulary import train_tokenizer
from fastserve.plan.facts import ModelFacts
from fastserve.spec.train import Scratch, Train
from fastserve.stages.train.network import STORED_AS, read_config

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_LONGEST = ("max_position_embeddings", "n_positions", "max_sequence_length")
_SPECIAL = ("bos_token", "eos_token", "pad_token")


def prepare(source: Path, data: Path, train: Train, into: Path) -> Path:
    """Lay out the model that `train` makes in the shape of `source`; returns `into`.

    source: a folder with config.json, and with a tokenizer unless `train.scratch.vocabulary` asks for one of its own;
    its weights, if it has any, are not read. data: the rows of `train.dataset`. into: a folder that is made.

    The same source, data and section give the same files. Raises ManifestInvalid for values that do not fit the
    source's config.json, SourceInvalid without a tokenizer, DatasetInvalid when the rows teach a tokenizer nothing.
    """
    scratch = train.scratch or Scratch()
    into.mkdir(parents=True)
    config = overridden(read_config(source), scratch)
    if scratch.vocabulary is None:
        files = load_tokenizer(source)
        end = _end_of_turn(files)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, into / name)
    else:
        files, end = (
            _trained_tokenizer(data, scratch.vocabulary, into, whole(config, _LONGEST) or train.max_length),
            None,
        )
        config = overridden(config, Scratch(), files.tokenizer().get_vocab_size())
        _rename_special(config, files)
    stops = list(stop_set(files, end).ids)
    if stops:
        generation = _read(into / "generation_config.json") | {"eos_token_id": stops}
        _write(into / "generation_config.json", generation)
    config.pop("quantization_config", None)  # what is made here is not quantised
    _write(into / "config.json", config)
    return into


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder that `prepare` made: all that a worker needs of it."""
    return read_config(folder)


def facts_of(folder: Path, train: Train) -> ModelFacts:
    """Shape and size of the model in a folder that `prepare` made."""
    files = from_folder(folder)
    return describe_new(folder, Scratch(), STORED_AS.get(train.precision, "float32"), files, _end_of_turn(files))


def _trained_tokenizer(data: Path, vocabulary: int, into: Path, longest: int) -> TokenizerFiles:
    """Train a tokenizer on the rows at `data` and leave its files in `into`, as transformers and vLLM read them."""
    made = into / "tokenizer"
    train_tokenizer(data, vocabulary, made)
    files = from_folder(made)
    shutil.rmtree(made)
    write_tokenizer(files, into, None, longest)
    return from_folder(into)


def _rename_special(config: dict[str, Any], files: TokenizerFiles) -> None:
    """Give the configuration the new tokenizer's special tokens instead of the old ones' numbers."""
    tokenizer = files.tokenizer()
    inner = config.get("text_config")
    for name in _SPECIAL:
        number = tokenizer.token_to_id(files.special[name]) if name in files.special else None
        for place in (config, inner):
            if isinstance(place, dict) and (place is config or f"{name}_id" in place):
                place[f"{name}_id"] = number


def _end_of_turn(files: TokenizerFiles) -> int | None:
    if files.chat_template is None:
        return None
    return turn_end(files.chat_template, files.tokenizer(), special=files.special)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
