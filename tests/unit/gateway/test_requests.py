"""The allow-list of fields, field by field."""

from __future__ import annotations

import json

import pytest

from fastserve.gateway.answers import Refusal
from fastserve.gateway.requests import ENDPOINTS, check, parse

CHAT = ENDPOINTS["/v1/chat/completions"]
MESSAGES = [{"role": "user", "content": "hi"}]


def passed(endpoint=CHAT, /, **fields):
    """The body that goes to the engine."""
    return json.loads(check(endpoint, fields).body)


def chat(**fields):
    return passed(model="m", messages=MESSAGES, **fields)


def refused(endpoint=CHAT, /, **fields):
    """param and code of the refusal."""
    with pytest.raises(Refusal) as caught:
        check(endpoint, fields)
    assert caught.value.status == 400
    return caught.value.param, caught.value.code


DANGEROUS = [
    *("chat_template", "documents", "cache_salt", "allowed_token_ids", "mm_processor_kwargs", "media_io_kwargs"),
    *("prompt_embeds", "tokenize", "kv_transfer_params", "vllm_xargs", "priority", "request_id", "prompt_logprobs"),
    *("use_beam_search", "best_of", "guided_regex", "guided_anything", "logits_processors", "functions", "audio"),
]


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_dangerous_field_is_refused_by_name(name):
    assert refused(model="m", messages=MESSAGES, **{name: None}) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt", "documents"])
def test_template_variables_that_could_replace_the_template_are_refused(name):
    param, code = refused(model="m", messages=MESSAGES, chat_template_kwargs={name: True})
    assert (param, code) == (f"chat_template_kwargs.{name}", "unsupported_parameter")


def test_harmless_template_variables_pass():
    assert chat(chat_template_kwargs={"enable_thinking": False})["chat_template_kwargs"] == {"enable_thinking": False}


RIGHT = [
    {"temperature": 0},
    {"temperature": 2, "top_p": 1, "frequency_penalty": -2, "presence_penalty": 2},
    {"n": 8},
    {"n": 3.0},
    {"seed": -1},
    {"stop": "\n"},
    {"stop": ["x" * 256] * 16},
    {"logprobs": True, "top_logprobs": 20},
    {"logit_bias": {str(token): -100 for token in range(300)}},
    {"max_tokens": 1},
    {"max_completion_tokens": 1},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"reasoning_effort": "low"},
    {"user": "someone"},
]


@pytest.mark.parametrize("fields", RIGHT)
def test_right_fields_pass_unchanged(fields):
    assert chat(**fields) == {"model": "m", "messages": MESSAGES, **fields}


WRONG = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": [1]}, "top_p"),
    ({"n": 9}, "n"),
    ({"n": 0}, "n"),
    ({"n": 1_000_000_000}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": "1"}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"logit_bias": {str(token): 0 for token in range(301)}}, "logit_bias"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": 1, "stream": True}, "stream_options"),
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    ({"structured_outputs": {"regex": "(a+)+b"}}, "structured_outputs.regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_a_wrong_field_is_named(fields, param):
    assert refused(model="m", messages=MESSAGES, **fields)[0] == param


CONVERSATIONS = [
    (None, "messages"),
    ([], "messages"),
    ("hi", "messages"),
    ([1], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "wizard", "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": 7}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
        "messages[0].content[0].type",
    ),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    ([{"role": "assistant", "tool_calls": [{"id": 1}]}], "messages[0].tool_calls[0].function"),
]


@pytest.mark.parametrize(("messages", "param"), CONVERSATIONS)
def test_a_wrong_message_is_named_with_its_place(messages, param):
    assert refused(model="m", messages=messages)[0] == param


def test_a_conversation_with_tools_passes_and_what_is_unknown_in_it_is_dropped():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "be kind", "cache_control": {}}]},
        {"role": "user", "content": "hi", "mm_payload": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    body = passed(model="m", messages=conversation, tools=tools, tool_choice="auto", parallel_tool_calls=False)
    assert body["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
    ]
    assert body["tools"] == tools
    assert body["tool_choice"] == "auto"


def test_the_newer_name_of_the_token_limit_wins():
    assert "max_tokens" not in chat(max_tokens=5, max_completion_tokens=7)


def test_null_means_absent():
    assert chat(temperature=None, stop=None, stream=None) == {"model": "m", "messages": MESSAGES}


def test_a_missing_field_is_named():
    assert refused(model="m")[0] == "messages"
    assert refused(messages=MESSAGES)[0] == "model"
    assert refused(ENDPOINTS["/v1/completions"], model="m")[0] == "prompt"
    assert refused(ENDPOINTS["/v1/embeddings"], model="m")[0] == "input"
    assert refused(ENDPOINTS["/v1/rerank"], model="m", query="q")[0] == "documents"
    assert refused(ENDPOINTS["/v1/score"], model="m", text_1="q")[0] == "text_2"


@pytest.mark.parametrize("prompt", ["one", ["one", "two"], [1, 2], [[1, 2], [3]]])
def test_a_prompt_is_text_or_token_ids(prompt):
    assert passed(ENDPOINTS["/v1/completions"], model="m", prompt=prompt, logprobs=5)["prompt"] == prompt


@pytest.mark.parametrize("prompt", [[], [[]], 7, {"a": 1}, [None], [1, "a"], [-1], [True, 1.5]])
def test_anything_else_is_no_prompt(prompt):
    assert str(refused(ENDPOINTS["/v1/completions"], model="m", prompt=prompt)[0]).startswith("prompt")


def test_text_of_every_language_goes_in_as_it_is():
    words = [{"role": "user", "content": 'Zürich 東京 🌍 "\\ \n\t \u2028'}]
    assert passed(model="m", messages=words)["messages"] == words


SCHEMA_WRONG = [
    *([], "x", None, {"type": 7}, {"type": "text"}, {"type": ["object", 1]}, {"enum": []}, {"enum": "a"}),
    *({"properties": []}, {"properties": {"a": 1}}, {"required": "a"}, {"required": [1]}, {"anyOf": []}, {"anyOf": {}}),
    *(
        {"items": 1},
        {"items": [1]},
        {"$ref": "http://evil/x"},
        {"$ref": "#"},
        {"$ref": 1},
        {"$defs": 1},
        {"allOf": [1]},
    ),
    *({"enum": ["x" * 40_000]}, {"enum": list(range(5000))}, {"properties": {"a": {"type": "nothing"}}}, {"not": 1}),
]


@pytest.mark.parametrize("schema", SCHEMA_WRONG, ids=range(len(SCHEMA_WRONG)))
def test_a_malformed_schema_is_refused(schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    param, code = refused(model="m", messages=MESSAGES, response_format=wanted)
    assert (param, code) == ("response_format.json_schema.schema", "invalid_json_schema")


def test_a_schema_nested_too_deep_is_refused():
    schema = {"type": "object"}
    for _ in range(20):
        schema = {"type": "array", "items": schema}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    assert refused(model="m", messages=MESSAGES, response_format=wanted)[1] == "invalid_json_schema"


def test_a_regular_expression_in_a_schema_is_refused():
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "string", "pattern": "(a+)+b"}}}
    param, code = refused(model="m", messages=MESSAGES, response_format=wanted)
    assert (param, code) == ("response_format.json_schema.schema.pattern", "unsupported_parameter")


def test_a_right_schema_passes_unchanged():
    schema = {
        "type": "object",
        "properties": {
            "pattern": {"type": "string", "enum": ["a", "b"]},
            "type": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]},
            "list": {"type": "array", "items": {"type": ["integer", "null"]}},
            "data": {"const": {"type": 7, "pattern": "x"}},
        },
        "required": ["type"],
        "additionalProperties": False,
        "$defs": {"leaf": {"type": "number"}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    assert chat(response_format=wanted)["response_format"] == wanted


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"{", b"nul", b"[]", b'"x"', b'{"a":Infinity}', b"\xef\xbb\xbf{}"])
def test_what_is_not_a_json_object_is_refused(raw):
    with pytest.raises(Refusal) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
