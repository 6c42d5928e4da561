"""Checks for the fields of a request: each takes a value and its place, and gives back what is passed inwards.

Only what a check has understood reaches an engine. Most engine flaws of the last years came in by a field that a
gateway had passed on unread, so limits are here and not behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from fastserve.gateway.answers import bad_request, unsupported
from fastserve.gateway.forms import Upload
from fastserve.gateway.schemas import schema

Check = Callable[[Any, str], object]
"""Value and its place (`messages[0].role`) to the value passed inwards. Raises Refusal that names the place."""

INT64_MAX = 2**63 - 1
LONGEST_NAME = 64
_FUNCTION = re.compile(r"[A-Za-z0-9_-]{1,64}")


def flag(value: Any, param: str) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise bad_request(f"'{param}' is not true or false.", param)
    return value


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`; JSON's `3.0` is one."""

    def check(value: Any, param: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad_request(f"'{param}' is not a whole number.", param)
        if not low <= value <= high:
            raise bad_request(f"'{param}' is out of range; give a whole number from {low} to {high}.", param)
        return value

    return check


def number(low: float, high: float) -> Check:
    """A finite number from `low` to `high`."""

    def check(value: Any, param: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad_request(f"'{param}' is not a number.", param)
        if not (math.isfinite(value) and low <= value <= high):
            raise bad_request(f"'{param}' is out of range; give a number from {low:g} to {high:g}.", param)
        return value

    return check


def text(longest: int | None = None) -> Check:
    """A text of at most `longest` characters."""

    def check(value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise bad_request(f"'{param}' is not a text.", param)
        if longest is not None and len(value) > longest:
            raise bad_request(f"'{param}' has {len(value)} characters; give at most {longest}.", param)
        return value

    return check


def choice(*words: str) -> Check:
    """One of `words`."""

    def check(value: Any, param: str) -> str:
        if not isinstance(value, str) or value not in words:
            raise bad_request(f"'{param}' is not one of {', '.join(words)}.", param)
        return value

    return check


def each(item: Check, low: int, high: int) -> Check:
    """A list of `low` to `high` items."""

    def check(value: Any, param: str) -> list[object]:
        if not isinstance(value, list):
            raise bad_request(f"'{param}' is not a list.", param)
        if not low <= len(value) <= high:
            raise bad_request(f"'{param}' has {len(value)} items; give {low} to {high}.", param)
        return [item(entry, f"{param}[{place}]") for place, entry in enumerate(value)]

    return check


def one_or_each(item: Check, low: int, high: int) -> Check:
    """One item, or a list of `low` to `high`."""
    many = each(item, low, high)

    def check(value: Any, param: str) -> object:
        return many(value, param) if isinstance(value, list) else item(value, param)

    return check


def tokens_or_texts(value: Any, param: str) -> object:
    """A prompt: a text, texts, token ids, or lists of token ids."""
    ids = each(whole(0, 2**31 - 1), 1, 2**20)
    if isinstance(value, list) and value and isinstance(value[0], int):
        return ids(value, param)

    def item(entry: Any, place: str) -> object:
        return ids(entry, place) if isinstance(entry, list) else text()(entry, place)

    return one_or_each(item, 1, 2048)(value, param)


def filled(check: Check) -> Check:
    """A text that is not empty, or a list without empty ones."""

    def examine(value: Any, param: str) -> object:
        for entry, place in [(value, param)] if isinstance(value, str) else _places(value, param):
            if entry == "":
                raise bad_request(f"'{place}' is empty.", param)
        return check(value, param)

    return examine


def _places(value: Any, param: str) -> list[tuple[Any, str]]:
    return [(entry, f"{param}[{at}]") for at, entry in enumerate(value)] if isinstance(value, list) else []


def written(check: Check) -> Check:
    """A number that a form holds as text."""

    def examine(value: Any, param: str) -> object:
        try:
            return check(float(value), param)
        except (TypeError, ValueError):
            raise bad_request(f"'{param}' is not a number.", param) from None

    return examine


def upload(value: Any, param: str) -> Upload:
    """A file of a form."""
    if not isinstance(value, Upload):
        raise bad_request(f"'{param}' is not a file.", param)
    return value


def logit_bias(value: Any, param: str) -> dict[str, object]:
    """Token id to bias, at most 300."""
    if not isinstance(value, dict):
        raise bad_request(f"'{param}' is not a mapping of token ids to numbers.", param)
    if len(value) > 300:
        raise bad_request(f"'{param}' has {len(value)} entries; give at most 300.", param)
    bias = number(-100, 100)
    for token in value:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise bad_request(f"'{param}' has a key that is not a token id.", param)
    return {token: bias(amount, f"{param}.{token}") for token, amount in value.items()}


def stream_options(value: Any, param: str) -> dict[str, object]:
    """`{"include_usage": true}`; other options are left out."""
    options = mapping(value, param)
    return (
        {"include_usage": flag(options["include_usage"], f"{param}.include_usage")}
        if "include_usage" in options
        else {}
    )


def template_switches(value: Any, param: str) -> dict[str, object]:
    """The few variables of a chat template that clients may set; everything else could replace the template."""
    switches = {"enable_thinking": flag, "thinking": flag, "reasoning_effort": choice("low", "medium", "high")}
    given = mapping(value, param)
    for name in given:
        if name not in switches:
            raise unsupported(f"{param}.{str(name)[:LONGEST_NAME]}")
    return {name: switches[name](entry, f"{param}.{name}") for name, entry in given.items()}


def mapping(value: Any, param: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise bad_request(f"'{param}' is not an object.", param)
    return value


def messages(value: Any, param: str) -> list[object]:
    """A conversation: 1 to 4096 messages."""
    return each(_message, 1, 4096)(value, param)  # type: ignore[return-value]


def _message(value: Any, param: str) -> dict[str, object]:
    given = mapping(value, param)
    role = choice("system", "developer", "user", "assistant", "tool")(given.get("role"), f"{param}.role")
    kept: dict[str, object] = {"role": role}
    content = given.get("content")
    calls = given.get("tool_calls")
    if content is not None:
        place = f"{param}.content"
        kept["content"] = each(_part, 1, 256)(content, place) if isinstance(content, list) else text()(content, place)
    elif role != "assistant":
        raise bad_request(f"'{param}.content' is missing.", f"{param}.content")
    if calls is not None and role == "assistant":
        kept["tool_calls"] = each(_call, 0, 128)(calls, f"{param}.tool_calls")
    for name in ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content"):
        if given.get(name) is not None:
            kept[name] = text()(given[name], f"{param}.{name}")
    return kept


def _part(value: Any, param: str) -> dict[str, object]:
    given = mapping(value, param)
    kind = given.get("type")
    if kind not in ("text", "refusal"):
        raise unsupported(f"{param}.type", f"'{param}' is not text; this model takes parts of type 'text' only.")
    return {"type": kind, kind: text()(given.get(kind), f"{param}.{kind}")}


def _call(value: Any, param: str) -> dict[str, object]:
    given = mapping(value, param)
    function = mapping(given.get("function"), f"{param}.function")
    return {
        "id": text(256)(given.get("id"), f"{param}.id"),
        "type": "function",
        "function": {
            "name": _function_name(function.get("name"), f"{param}.function.name"),
            "arguments": text()(function.get("arguments"), f"{param}.function.arguments"),
        },
    }


def _function_name(value: Any, param: str) -> str:
    if not isinstance(value, str) or not _FUNCTION.fullmatch(value):
        raise bad_request(f"'{param}' is not a name of 1 to 64 letters, digits, '_' and '-'.", param)
    return value


def tool(value: Any, param: str) -> dict[str, object]:
    """A function that the model may call."""
    given = mapping(value, param)
    choice("function")(given.get("type"), f"{param}.type")
    function = mapping(given.get("function"), f"{param}.function")
    kept: dict[str, object] = {"name": _function_name(function.get("name"), f"{param}.function.name")}
    if function.get("description") is not None:
        kept["description"] = text()(function["description"], f"{param}.function.description")
    if function.get("parameters") is not None:
        kept["parameters"] = schema(function["parameters"], f"{param}.function.parameters")
    if function.get("strict") is not None:
        kept["strict"] = flag(function["strict"], f"{param}.function.strict")
    return {"type": "function", "function": kept}


def tool_choice(value: Any, param: str) -> object:
    """none, auto, required, or one function by name."""
    if not isinstance(value, dict):
        return choice("none", "auto", "required")(value, param)
    choice("function")(value.get("type"), f"{param}.type")
    function = mapping(value.get("function"), f"{param}.function")
    return {"type": "function", "function": {"name": _function_name(function.get("name"), f"{param}.function.name")}}


def response_format(value: Any, param: str) -> dict[str, object]:
    """text, json_object, or json_schema with a schema that can be compiled in bounded time."""
    given = mapping(value, param)
    kind = choice("text", "json_object", "json_schema")(given.get("type"), f"{param}.type")
    if kind != "json_schema":
        return {"type": kind}
    inner = mapping(given.get("json_schema"), f"{param}.json_schema")
    kept: dict[str, object] = {"name": _function_name(inner.get("name"), f"{param}.json_schema.name")}
    kept["schema"] = schema(inner.get("schema"), f"{param}.json_schema.schema")
    if inner.get("strict") is not None:
        kept["strict"] = flag(inner["strict"], f"{param}.json_schema.strict")
    return {"type": kind, "json_schema": kept}


def structured_outputs(value: Any, param: str) -> dict[str, object]:
    """`{"choice": [...]}` or `{"json": schema}`; regular expressions and grammars have no bound on their cost."""
    checks: dict[str, Check] = {"choice": each(text(256), 1, 128), "json": schema}
    given = mapping(value, param)
    for name in given:
        if name not in checks:
            raise unsupported(f"{param}.{str(name)[:LONGEST_NAME]}")
    if len(given) != 1:
        raise bad_request(f"'{param}' needs exactly one of {', '.join(checks)}.", param)
    return {name: checks[name](entry, f"{param}.{name}") for name, entry in given.items()}
