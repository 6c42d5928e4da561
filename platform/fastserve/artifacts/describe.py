"""The shape and size of a model from its headers alone, so that a plan can be made before anything heavy is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastserve.artifacts import safetensors_header
from fastserve.artifacts.file_types import read_object
from fastserve.artifacts.gguf_header import GgufHeader, read_gguf
from fastserve.artifacts.model_config import overridden
from fastserve.artifacts.safetensors_header import Header
from fastserve.artifacts.tokenizer import TokenizerFiles, from_folder, from_gguf, stop_set
from fastserve.errors import SourceInvalid
from fastserve.plan.facts import ModelFacts
from fastserve.plan.memory import linear_layers
from fastserve.plan.tasks import is_encoder, is_speech
from fastserve.plan.tools import reasoning_parser, tool_parser
from fastserve.spec.train import Scratch

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SENTENCES = "sentence_bert_config.json"
_IMPORTED_BYTES = 2
"""A .gguf file is dequantised to bf16 on import."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_context",
    "tie_word_embeddings": "tied_embeddings",
}
"""Keys of config.json by the fact that they change."""

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "starcoder2": "Starcoder2ForCausalLM",
    "mistral": "MistralForCausalLM",
}
"""By `general.architecture`; what is not listed cannot be imported."""


USUAL_LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
"""What most decoders call the matrices of a block."""

_USUALLY_NAMED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"})
"""GGUF architectures whose matrices get those names on import."""


def describe(path: Path, tokenizer: TokenizerFiles | None = None, turn_end: int | None = None) -> ModelFacts:
    """Facts of a folder in Hugging Face layout or of a .gguf file.

    path: as `sources.fetch` or `sources.outline` returns it, or an artifact's `model/`.
    tokenizer: what `load_tokenizer(path)` returned, to save reading it twice.
    turn_end: id that the chat template writes after an assistant's turn (`data.template.turn_end`).
    Raises SourceInvalid that says what is missing or wrong.
    """
    model = only_gguf(path)
    if model is not None:
        header = read_gguf(model)
        return _of_gguf(header, tokenizer or from_gguf(header, model.name), turn_end, model.name)
    if path.is_file():
        raise SourceInvalid(f"{path.name}: is not a model; name a folder in Hugging Face layout or a .gguf file")
    _require_files(path, ("config.json", "*.safetensors", "tokenizer.json"), tokenizer)
    config = read_object(path / "config.json", "config.json", path.name)
    headers = {file.name: safetensors_header.check(file) for file in sorted(path.glob("*.safetensors"))}
    return _of_folder(path, config, headers, tokenizer or from_folder(path), turn_end)


def describe_new(
    path: Path, scratch: Scratch, stored_as: str, tokenizer: TokenizerFiles, turn_end: int | None = None
) -> ModelFacts:
    """Facts of the model that is made from scratch in the shape of `path`, whose weights, if any, are not read.

    scratch: what is to be different. stored_as: type of its weights, such as `bfloat16`.
    tokenizer: of the new model. Its parameters are computed from the shape of a gated decoder, which is exact for Llama
    and what resembles it and a little above for older ones.
    Raises SourceInvalid, and ManifestInvalid for values that do not fit config.json.
    """
    vocabulary = tokenizer.tokenizer().get_vocab_size() if scratch.vocabulary else None
    packed = only_gguf(path)
    if packed is not None:
        facts = _reshaped(describe(packed, tokenizer, turn_end), scratch, vocabulary)
    else:
        _require_files(path, ("config.json",), tokenizer)
        config = read_object(path / "config.json", "config.json", path.name)
        facts = _of_folder(path, overridden(config, scratch, vocabulary), {}, tokenizer, turn_end)
    parameters = _decoder_parameters(facts)
    return replace(facts, parameters=parameters, weight_bytes=parameters * _BYTES.get(stored_as, 4), dtype=stored_as)


def has_weights(path: Path) -> bool:
    """Whether a source, as `fetch` or `outline` returns it, holds any weights."""
    return only_gguf(path) is not None or any(path.glob("*.safetensors"))


def _require_files(path: Path, names: tuple[str, ...], tokenizer: TokenizerFiles | None) -> None:
    """Raise SourceInvalid with all of `names` that the folder does not have."""
    missing = [
        name for name in names if not any(path.glob(name)) and not (name == "tokenizer.json" and tokenizer is not None)
    ]
    if missing == ["tokenizer.json"]:
        from_folder(path)  # says which other tokenizer is there
    if missing:
        shape_alone = "*.safetensors" in missing and "config.json" not in missing
        hint = ", or train it with method: scratch" if shape_alone else ""
        raise SourceInvalid(
            f"{path.name}: is not a model: it has no {' and no '.join(missing)}; "
            f"add what is missing, or name another folder{hint}"
        )


def only_gguf(path: Path) -> Path | None:
    """The .gguf file that a source consists of, or None when it is a folder in Hugging Face layout."""
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    models = sorted(path.glob("*.gguf"))
    return models[0] if len(models) == 1 and not any(path.glob("*.safetensors")) else None


def _of_folder(
    folder: Path,
    config: Mapping[str, Any],
    headers: Mapping[str, Header],
    tokenizer: TokenizerFiles,
    turn_end: int | None,
) -> ModelFacts:
    """config: of the folder, or as it will be. headers: of its safetensors files by name; none for a new model."""
    inner = config.get("text_config")
    shape: Mapping[str, Any] = {**config, **inner} if isinstance(inner, dict) else config
    parameters, weight_bytes = safetensors_header.total(headers)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise SourceInvalid(
            f"{folder.name}: config.json names no architecture ('architectures'); use a model saved by transformers"
        )
    hidden = _whole(shape, ("hidden_size", "n_embd", "d_model"), folder.name)
    hears = is_speech(architectures[0])
    # Of a model that hears, the part that writes is what keeps a cache.
    head_names = ("decoder_attention_heads",) if hears else ("num_attention_heads", "n_head", "encoder_attention_heads")
    layer_names = ("decoder_layers",) if hears else ("num_hidden_layers", "n_layer", "encoder_layers")
    heads = _whole(shape, head_names, folder.name)
    stops = stop_set(tokenizer, turn_end)
    return ModelFacts(
        architecture=architectures[0],
        parameters=parameters,
        weight_bytes=weight_bytes,
        layers=_whole(shape, layer_names, folder.name),
        hidden=hidden,
        intermediate=_whole(shape, ("intermediate_size", "n_inner", "encoder_ffn_dim"), folder.name, 4 * hidden),
        heads=heads,
        kv_heads=_whole(shape, ("num_key_value_heads",), folder.name, heads),
        head_dim=_whole(shape, ("head_dim",), folder.name, hidden // max(heads, 1)),
        vocab=_whole(shape, ("vocab_size",), folder.name),
        max_context=_longest(folder, architectures[0], shape),
        most_context=_stretched(_longest(folder, architectures[0], shape), architectures[0], shape),
        tied_embeddings=_tied(shape, headers),
        dtype=_main_dtype(headers),
        layer_names=tuple(sorted({name for name, _ in _matrices(headers)})),
        layer_shapes=_layer_shapes(headers),
        stop_tokens=stops.ids,
        heard_positions=_whole(shape, ("max_source_positions",), folder.name) if hears else 0,
        tool_parser=tool_parser(architectures[0], tokenizer.chat_template),
        reasoning_parser=reasoning_parser(architectures[0], tokenizer.chat_template),
        warnings=stops.warnings if architectures[0].endswith(_GENERATING) and not hears else (),
    )


def _positions(architecture: str) -> tuple[str, ...]:
    """Keys of config.json that say how many positions there are."""
    return ("max_target_positions",) if is_speech(architecture) else ("max_position_embeddings", "n_positions")


def _stretched(longest: int, architecture: str, shape: Mapping[str, Any]) -> int:
    """Longest sequence that an engine takes; 0 where config.json does not say how many positions there are.

    Some kinds of scaling are in the number of positions already; then this is above what the engine takes, and never
    below it.
    """
    if all(shape.get(name) is None for name in _positions(architecture)):
        return 0
    scaling = [shape.get(name) for name in ("rope_scaling", "rope_parameters")]
    blocks = [block for block in scaling if isinstance(block, dict)]
    blocks += [inner for block in blocks for inner in block.values() if isinstance(inner, dict)]
    factors = [block["factor"] for block in blocks if isinstance(block.get("factor"), int | float)]
    own = shape.get("model_max_length")
    return max(int(longest * max([1.0, *factors])), own if isinstance(own, int) else 0)


def _longest(folder: Path, architecture: str, shape: Mapping[str, Any]) -> int:
    """Longest sequence in tokens, as the engine will count it."""
    longest = _whole(shape, _positions(architecture), folder.name, 2048)
    if "Roberta" in architecture:  # its positions begin behind that of the padding token
        longest -= _whole(shape, ("pad_token_id",), folder.name, 1) + 1
    if is_encoder(architecture) and (folder / _SENTENCES).is_file():
        # What the vectors were trained with; beyond it they mean less.
        longest = min(
            longest,
            _whole(
                read_object(folder / _SENTENCES, _SENTENCES, folder.name), ("max_seq_length",), folder.name, longest
            ),
        )
    return longest


def _of_gguf(header: GgufHeader, tokenizer: TokenizerFiles, turn_end: int | None, name: str) -> ModelFacts:
    kind = header.text("general.architecture")
    if kind not in GGUF_ARCHITECTURES:
        raise SourceInvalid(
            f"{name}: the GGUF architecture '{kind}' cannot be imported; known are {', '.join(GGUF_ARCHITECTURES)}: "
            "use the model's folder in Hugging Face layout instead"
        )
    if not header.tensors or "token_embd.weight" not in header.tensors:
        raise SourceInvalid(
            f"{name}: has no weights (token_embd.weight is missing); it may be a vocabulary alone, name the model's "
            "file"
        )
    parameters = sum(tensor.elements for tensor in header.tensors.values() if not _is_table(tensor.name))
    hidden = header.whole(f"{kind}.embedding_length")
    heads = header.whole(f"{kind}.attention.head_count")
    stops = stop_set(tokenizer, turn_end)
    facts = ModelFacts(
        architecture=GGUF_ARCHITECTURES[kind],
        parameters=parameters,
        weight_bytes=parameters * _IMPORTED_BYTES,
        layers=header.whole(f"{kind}.block_count"),
        hidden=hidden,
        intermediate=header.whole(f"{kind}.feed_forward_length", 4 * hidden),
        heads=heads,
        kv_heads=header.whole(f"{kind}.attention.head_count_kv", heads),
        head_dim=header.whole(f"{kind}.attention.key_length", hidden // max(heads, 1)),
        vocab=header.tensors["token_embd.weight"].shape[-1],
        max_context=header.whole(f"{kind}.context_length"),
        most_context=header.whole(f"{kind}.context_length"),
        tied_embeddings="output.weight" not in header.tensors,
        dtype="bfloat16",
        layer_names=USUAL_LAYERS if kind in _USUALLY_NAMED else (),
        tool_parser=tool_parser(GGUF_ARCHITECTURES[kind], tokenizer.chat_template),
        reasoning_parser=reasoning_parser(GGUF_ARCHITECTURES[kind], tokenizer.chat_template),
        stop_tokens=stops.ids,
        warnings=stops.warnings,
    )
    if kind not in _USUALLY_NAMED:
        return facts
    shapes = sorted(linear_layers(facts).items())
    return replace(facts, layer_shapes=tuple((name, inputs, outputs) for name, (inputs, outputs) in shapes))


def _reshaped(facts: ModelFacts, scratch: Scratch, vocabulary: int | None) -> ModelFacts:
    """Facts of a .gguf file with those values of `scratch.config` that change them; its config.json is made later."""
    changed: dict[str, Any] = {"layer_shapes": ()} | {
        field: value
        for key, value in scratch.config.items()
        for field in (_FIELDS.get(key),)
        if field is not None and isinstance(value, int)
    }
    if vocabulary is not None:
        changed["vocab"] = vocabulary
    if "max_context" in changed:
        changed["most_context"] = changed["max_context"]
    return replace(facts, **changed)


def _decoder_parameters(facts: ModelFacts) -> int:
    """Numbers of a decoder with grouped-query attention and a gated feed-forward block (Touvron et al., 2023, arXiv
    2307.09288)."""
    attention = 2 * facts.hidden * facts.head_dim * (facts.heads + facts.kv_heads)
    block = attention + 3 * facts.hidden * facts.intermediate + 2 * facts.hidden
    embeddings = facts.vocab * facts.hidden * (1 if facts.tied_embeddings else 2)
    return facts.layers * block + facts.hidden + embeddings


def _is_table(name: str) -> bool:
    """Tables of rotary factors are computed, not weights."""
    return name.startswith("rope_")


def _whole(config: Mapping[str, Any], names: tuple[str, ...], source: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 < value < 2**40:
            raise SourceInvalid(
                f"{source}: config.json: {name} is {value!r:.40}, not a whole number above zero; correct it"
            )
        return value
    if default is None:
        raise SourceInvalid(f"{source}: config.json has no {names[0]}; use a model saved by transformers")
    return default


def _matrices(headers: Mapping[str, Header]) -> list[tuple[str, tuple[int, int]]]:
    """Last part of the name, inputs and outputs of each matrix in a numbered block.

    `model.layers.0.mlp.up_proj.weight` is `up_proj`.
    """
    found: list[tuple[str, tuple[int, int]]] = []
    for header in headers.values():
        for name, info in header.tensors.items():
            *place, layer, kind = ("", *name.split("."))
            if kind == "weight" and len(info.shape) == 2 and any(part.isdigit() for part in place):
                found.append((layer, (info.shape[1], info.shape[0])))
    return found


def _layer_shapes(headers: Mapping[str, Header]) -> tuple[tuple[str, int, int], ...]:
    shapes: dict[str, set[tuple[int, int]]] = {}
    for layer, shape in _matrices(headers):
        shapes.setdefault(layer, set()).add(shape)
    return tuple((layer, *found.pop()) for layer, found in sorted(shapes.items()) if len(found) == 1)


def _tied(config: Mapping[str, Any], headers: Mapping[str, Header]) -> bool:
    said = config.get("tie_word_embeddings")
    if isinstance(said, bool):
        return said
    return not any(name.endswith("lm_head.weight") for header in headers.values() for name in header.tensors)


def _main_dtype(headers: Mapping[str, Header]) -> str:
    """Type of most weights, in the engine's words; a quantised model computes in bfloat16."""
    counts: Counter[str] = Counter()
    for header in headers.values():
        for info in header.tensors.values():
            counts[info.dtype] += info.elements
    floats = [(count, dtype) for dtype, count in counts.items() if dtype in _DTYPES]
    quantised = counts and counts.most_common(1)[0][0] not in _DTYPES
    return "bfloat16" if quantised or not floats else _DTYPES[max(floats)[1]]
