"""Bring a model into the store once, in the one layout that every later stage reads.

What the source said about itself is settled here: after this stage there is one tokenizer, one template and one list of
end tokens, and nobody asks a converter's leftovers again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.artifacts import sources
from fastserve.artifacts.adapter import CONFIG, WEIGHTS, read_adapter
from fastserve.artifacts.describe import describe, has_weights, only_gguf
from fastserve.artifacts.gguf_header import read_gguf
from fastserve.artifacts.tokenizer import StopSet, TokenizerFiles, load_tokenizer, stop_set, write_tokenizer
from fastserve.data.template import turn_end
from fastserve.errors import SourceNotFound
from fastserve.plan.facts import ModelFacts
from fastserve.plan.keys import ident_of
from fastserve.spec.source import Source
from fastserve.stages.source.gguf_weights import dequantise

if TYPE_CHECKING:
    from fastserve.stages.work import Outcome, Work


def run(work: Work) -> Outcome:
    """Fetch and import the model of `spec.source`, or an adapter of `spec.serve.adapters`.

    The outcome's `model/` holds config.json, *.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja
    where there is a template, and generation_config.json with every end token. A folder's own files stay as they were,
    but for generation_config.json. A folder without weights, which only a model from scratch can be made of, stays as
    it is. Metrics: format, architecture, parameters, bytes, dtype, maxContext, stopTokens,
    warnings. Of an adapter, the outcome's `adapter/` holds its configuration and its weights; metrics: rank, modules,
    bytes.
    Raises SourceNotFound, SourceInvalid, DigestMismatch, StageFailed, StoreFull.
    """
    from fastserve.stages.work import Outcome

    if "adapter" in work.request.section:
        return _adapter(work, Source.model_validate(work.request.section["adapter"]))
    source = Source.model_validate(work.request.section)
    ident = ident_of(source)
    if ident not in work.request.data:
        raise SourceNotFound(f"{ident} was not resolved before this stage; run `fastserve up` again")
    model = work.scratch / "outcome" / "model"

    def tick(done_bytes: int, total_bytes: int) -> None:
        work.report.update(done_bytes, total_bytes, "bytes", note=f"fetching {ident}")

    place = sources.fetch(source, work.request.data[ident], into=model, role="model", progress=tick)
    packed = only_gguf(place)
    if not has_weights(place):
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        shape = {"format": "config", "architecture": (config.get("architectures") or ["-"])[0], "parameters": 0}
        return Outcome(work.scratch / "outcome", shape)
    if packed is None:
        facts = settle_folder(model)
    else:
        aside = work.scratch / packed.name
        shutil.move(packed, aside)
        work.report.update(0, aside.stat().st_size, "bytes", note="dequantising to bf16")
        facts = import_gguf(aside, model, work.scratch)
        work.report.update(aside.stat().st_size, aside.stat().st_size, "bytes", note="dequantised to bf16")
        aside.unlink()
    return Outcome(work.scratch / "outcome", _metrics(facts, "safetensors" if packed is None else "gguf"))


def _adapter(work: Work, source: Source) -> Outcome:
    from fastserve.stages.work import Outcome

    brought = work.data(source, "adapter")
    facts = read_adapter(brought, f"adapter {ident_of(source)}")
    into = work.scratch / "outcome" / "adapter"
    into.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.move(brought / name, into / name)
    metrics = {"format": "lora", "rank": facts.rank, "modules": list(facts.modules), "bytes": facts.size_bytes}
    return Outcome(work.scratch / "outcome", metrics)


def settle_folder(model: Path) -> ModelFacts:
    """Write all end tokens beside a model in Hugging Face layout, and its template where vLLM looks first."""
    files = load_tokenizer(model)
    end = end_of_turn(files)
    facts = describe(model, files, end)
    if facts.stop_tokens:
        path = model / "generation_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings["eos_token_id"] = list(facts.stop_tokens)
        _write_json(path, settings)
    if files.chat_template is not None and not (model / "chat_template.jinja").is_file():
        (model / "chat_template.jinja").write_text(files.chat_template, encoding="utf-8")
    return facts


def import_gguf(packed: Path, model: Path, scratch: Path) -> ModelFacts:
    """Turn a .gguf file into a folder in Hugging Face layout.

    packed: the file. model: the folder, made if absent. scratch: a folder for a copy as large as `packed`.
    """
    header = read_gguf(packed)
    files = load_tokenizer(packed)
    end = end_of_turn(files)
    facts = describe(packed, files, end)
    model.mkdir(parents=True, exist_ok=True)
    config = dequantise(packed, header, model, scratch)
    special = write_tokenizer(files, model, end, facts.max_context)
    _write_configs(model, config, files, special, stop_set(files, end))
    return facts


def end_of_turn(files: TokenizerFiles) -> int | None:
    """Id that the chat template writes after an assistant's turn; None without a template or a single token there."""
    if files.chat_template is None:
        return None
    return turn_end(files.chat_template, files.tokenizer(), special=files.special)


def _write_configs(
    model: Path, config: dict[str, Any], files: TokenizerFiles, special: dict[str, str], stops: StopSet
) -> None:
    tokenizer = files.tokenizer()
    ids: dict[str, Any] = {
        name + "_id": tokenizer.token_to_id(special[name]) for name in ("bos_token", "pad_token") if name in special
    }
    ids["eos_token_id"] = list(stops.ids)
    config.pop("_model_name_or_path", None)  # a name that some converter gave, or a folder of this machine
    config.pop("unk_token_id", None)
    config.update(ids)
    _write_json(model / "config.json", config)
    _write_json(model / "generation_config.json", ids)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _metrics(facts: ModelFacts, format_name: str) -> dict[str, Any]:
    return {
        "format": format_name,
        "architecture": facts.architecture,
        "parameters": facts.parameters,
        "bytes": facts.weight_bytes,
        "dtype": facts.dtype,
        "maxContext": facts.max_context,
        "stopTokens": list(facts.stop_tokens),
        "warnings": list(facts.warnings),
    }
