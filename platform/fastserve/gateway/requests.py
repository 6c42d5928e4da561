"""Which requests exist, and what of them is passed inwards.

An allow-list of routes and, for each, an allow-list of fields. A field that is dangerous, or that an OpenAI client
relies on and no engine here honours, is refused by name; any other unknown field is left out and named in the
answer's `x-fastserve-ignored`. The engine receives a body written anew from what was understood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fastserve.gateway import fields as f
from fastserve.gateway import forms, reshape
from fastserve.gateway.answers import bad_request, unsupported


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route that is passed on to an engine."""

    path: str
    tasks: tuple[str, ...]
    """The tasks of the models that have this route."""

    fields: Mapping[str, f.Check]
    required: tuple[str, ...]
    refused: frozenset[str]
    inward: str = ""
    """The engine's name of the route, where it is another."""

    form: bool = False
    """Whether it takes a form with a file instead of JSON."""

    @property
    def lists(self) -> tuple[str, ...]:
        """Fields that may stand more than once in a form."""
        return tuple(name for name in self.fields if name.endswith("[]"))


Reshape = Callable[[bytes], tuple[bytes, str]]
"""An engine's JSON to the body for the client and its content type."""


@dataclass(frozen=True, slots=True)
class Inward:
    """A request as it goes to an engine."""

    path: str
    model: str
    body: bytes
    stream: bool
    ignored: tuple[str, ...]
    """Fields that were left out because nobody here knows them."""

    content_type: str = "application/json"
    reshape: Reshape | None = None
    """Makes the engine's whole answer into the client's; None: it is passed on as it is."""


_DANGEROUS = frozenset(
    (
        # Replaces or steers the server's chat template: unbounded rendering.
        *("chat_template", "tokenize", "tokenizer", "trust_remote_code", "lora_request"),
        # Reaches into the engine's memory, cache or scheduling of other clients' requests.
        *("cache_salt", "allowed_token_ids", "logits_processors", "kv_transfer_params", "ec_transfer_params"),
        *("priority", "request_id", "session_id", "vllm_xargs", "data_parallel_rank", "routed_experts_prompt_start"),
        # Media and tensors.
        *("mm_processor_kwargs", "media_io_kwargs", "prompt_embeds", "mm_payload", "return_mm_kwargs", "mm_hashes"),
        # Work without bound.
        *("prompt_logprobs", "logprob_token_ids", "use_beam_search", "best_of", "length_penalty", "regex"),
        *("guided_json", "guided_regex", "guided_grammar", "guided_choice", "guided_decoding_backend"),
        *("guided_whitespace_pattern", "grammar", "structural_tag"),
    )
)
_NOT_HONOURED = frozenset(
    ("audio", "modalities", "functions", "function_call", "prediction", "web_search_options", "suffix")
)

_TOKENS = f.whole(1, 2**31 - 1)
_SAMPLING: Mapping[str, f.Check] = {
    "frequency_penalty": f.number(-2, 2),
    "logit_bias": f.logit_bias,
    "max_tokens": _TOKENS,
    "n": f.whole(1, 8),
    "presence_penalty": f.number(-2, 2),
    "response_format": f.response_format,
    "seed": f.whole(-f.INT64_MAX - 1, f.INT64_MAX),
    "stop": f.one_or_each(f.text(256), 0, 16),
    "stream": f.flag,
    "stream_options": f.stream_options,
    "temperature": f.number(0, 2),
    "top_p": f.number(0, 1),
    "user": f.text(512),
    # Beyond OpenAI, known to vLLM, bounded by themselves.
    "ignore_eos": f.flag,
    "include_stop_str_in_output": f.flag,
    "min_p": f.number(0, 1),
    "min_tokens": f.whole(0, 2**31 - 1),
    "repetition_penalty": f.number(0.01, 10),
    "skip_special_tokens": f.flag,
    "spaces_between_special_tokens": f.flag,
    "stop_token_ids": f.each(f.whole(0, 2**31 - 1), 0, 16),
    "structured_outputs": f.structured_outputs,
    "top_k": f.whole(-1, 2**31 - 1),
}
_CHAT: Mapping[str, f.Check] = {
    **_SAMPLING,
    "add_generation_prompt": f.flag,
    "chat_template_kwargs": f.template_switches,
    "continue_final_message": f.flag,
    "logprobs": f.flag,
    "max_completion_tokens": _TOKENS,
    "messages": f.messages,
    "parallel_tool_calls": f.flag,
    "reasoning_effort": f.choice("none", "minimal", "low", "medium", "high"),
    "tool_choice": f.tool_choice,
    "tools": f.each(f.tool, 1, 128),
    "top_logprobs": f.whole(0, 20),
}
_COMPLETIONS: Mapping[str, f.Check] = {
    **_SAMPLING,
    "add_special_tokens": f.flag,
    "echo": f.flag,
    "logprobs": f.whole(0, 20),
    "prompt": f.tokens_or_texts,
}
_TRUNCATE = f.whole(1, 2**31 - 1)
_EMBEDDINGS: Mapping[str, f.Check] = {
    "dimensions": _TOKENS,
    "encoding_format": f.choice("float", "base64"),
    "input": f.filled(f.tokens_or_texts),
    "truncate_prompt_tokens": _TRUNCATE,
    "user": f.text(512),
}
_TEXTS = f.one_or_each(f.text(), 1, 2048)
_RERANK: Mapping[str, f.Check] = {
    "documents": f.each(f.text(), 1, 2048),
    "query": f.text(),
    "top_n": f.whole(1, 2**31 - 1),
    "truncate_prompt_tokens": _TRUNCATE,
}
_SCORE: Mapping[str, f.Check] = {"text_1": _TEXTS, "text_2": _TEXTS, "truncate_prompt_tokens": _TRUNCATE}
_TRANSLATION: Mapping[str, f.Check] = {
    "file": f.upload,
    "prompt": f.text(4096),
    "response_format": f.choice("json", "text", "verbose_json"),
    "temperature": f.written(f.number(0, 1)),
}
_TRANSCRIPTION: Mapping[str, f.Check] = {
    **_TRANSLATION,
    "language": f.text(16),
    "timestamp_granularities[]": f.each(f.choice("word", "segment"), 1, 2),
}

_REFUSED = _DANGEROUS | _NOT_HONOURED
_SPOKEN = _REFUSED | {"stream"}
_VECTORS = _REFUSED | {"messages", "chat_template_kwargs"}
_RANKS = _REFUSED | {"chat_template_kwargs"}
ENDPOINTS: Mapping[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", ("generate",), _CHAT, ("messages",), _REFUSED | {"documents"}),
        Endpoint("/v1/completions", ("generate",), _COMPLETIONS, ("prompt",), _REFUSED | {"documents"}),
        Endpoint("/v1/embeddings", ("embed",), _EMBEDDINGS, ("input",), _VECTORS),
        # A model that makes vectors ranks by their cosine.
        Endpoint("/v1/rerank", ("score", "embed"), _RERANK, ("query", "documents"), _RANKS, "/rerank"),
        Endpoint("/v1/score", ("score", "embed"), _SCORE, ("text_1", "text_2"), _RANKS, "/score"),
        Endpoint("/v1/audio/transcriptions", ("transcribe",), _TRANSCRIPTION, ("file",), _SPOKEN, form=True),
        Endpoint("/v1/audio/translations", ("transcribe",), _TRANSLATION, ("file",), _SPOKEN, form=True),
    )
}


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises Refusal (400) when it is not one, or nested too deep."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise bad_request("The body is not valid JSON in UTF-8; send one JSON object.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The body is not a JSON object; send {...}.", code="invalid_json")
    return value


def model_of(given: Mapping[str, Any]) -> str:
    """The model that a request asks for. Raises Refusal (400) without one."""
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("'model' is missing; GET /v1/models lists the models.", "model")
    return model


def check(endpoint: Endpoint, given: Mapping[str, Any]) -> Inward:
    """What of the request `given` goes to the engine. Raises Refusal (400) that names the first wrong field."""
    model = model_of(given)
    kept: dict[str, object] = {"model": model}
    ignored = []
    for name, value in given.items():
        if name == "model":
            continue
        if name in endpoint.refused or name.startswith("guided_"):
            raise unsupported(name[: f.LONGEST_NAME])
        examine = endpoint.fields.get(name)
        if examine is None:
            ignored.append(name)
        elif value is not None:  # OpenAI reads null as absent
            kept[name] = examine(value, name)
    for name in endpoint.required:
        if name not in kept:
            raise bad_request(f"'{name}' is missing.", name)
    _agree(endpoint, kept)
    make = _reshape(endpoint, kept)
    kind, body = _written(endpoint, kept)
    return Inward(endpoint.inward or endpoint.path, model, body, bool(kept.get("stream")), tuple(ignored), kind, make)


def _written(endpoint: Endpoint, kept: Mapping[str, object]) -> tuple[str, bytes]:
    """Content type and body for the engine."""
    try:
        if endpoint.form:
            fields = {name: value for name, value in kept.items() if not isinstance(value, forms.Upload)}
            (file,) = (value for value in kept.values() if isinstance(value, forms.Upload))
            return forms.build(fields, file)
        return "application/json", json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request(
            "The body holds half of a surrogate pair; send well-formed text.", code="invalid_json"
        ) from None


def _reshape(endpoint: Endpoint, kept: dict[str, object]) -> Reshape | None:
    """What is to be done with the engine's answer; changes what the engine is asked for where it needs it otherwise."""
    if endpoint.path == "/v1/rerank":
        top_n = kept.get("top_n")
        return lambda body: reshape.ranked(body, top_n if isinstance(top_n, int) else None)
    if endpoint.form and kept.get("response_format") == "text":
        kept["response_format"] = "json"
        return reshape.plain_text
    return None


def _agree(endpoint: Endpoint, kept: dict[str, object]) -> None:
    """Fields that only make sense together."""
    if "max_completion_tokens" in kept:
        kept.pop("max_tokens", None)  # the newer name wins
    if endpoint.path == "/v1/chat/completions" and kept.get("top_logprobs") and kept.get("logprobs") is not True:
        raise bad_request("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if "timestamp_granularities[]" in kept and kept.get("response_format") != "verbose_json":
        words = "'timestamp_granularities[]' needs 'response_format': verbose_json."
        raise bad_request(words, "timestamp_granularities[]")
    if "stream_options" in kept and not kept.get("stream"):
        raise bad_request("'stream_options' needs 'stream': true.", "stream_options")
    if "tool_choice" in kept and "tools" not in kept:
        if kept["tool_choice"] not in ("none", "auto"):
            raise bad_request("'tool_choice' needs 'tools'.", "tool_choice")
        del kept["tool_choice"]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
