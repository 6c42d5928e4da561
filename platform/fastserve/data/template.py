"""Chat templates: how messages become the text that a model was made for.

A template is a program that came with the weights, so it runs in Jinja's sandbox with bounded work. Training needs to
know which part of the text the assistant wrote; templates do not say, so it is found by rendering prefixes: the text up
to the assistant's turn, and the text with that turn. A template for which one is not a prefix of the other (one that
rewrites earlier turns) is refused by name rather than trained wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastserve.errors import DatasetInvalid, SourceInvalid

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser
    from tokenizers import Tokenizer

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}` and what else the row holds, such as `tool_calls`."""

Span = tuple[int, int]
"""First character and the one behind the last."""

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_TEXT_CHARACTERS = 16 * 1024 * 1024
MAX_RANGE_STEPS = 1_000_000
"""Steps of all `range(...)` together in one rendering."""

_PROBE = "FastServe"


class _Budget(Exception):
    """The template wants to do more work than any real one."""


class _Refusal(Exception):
    """The template itself refused the messages through raise_exception."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text in some templates; its body is printed."""

    tags = {"generation"}  # noqa: RUF012 - the name and form that Jinja reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body, drop the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also watches the operators that can make something huge out of something small."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`"x" * 10**12` and `9 ** 9 ** 9` end here."""
        numbers = [side for side in (left, right) if isinstance(side, int | float)]
        if operator == "**" and any(abs(number) > 1000 for number in numbers):
            raise _Budget(f"{left} ** {right}")
        for side, other in ((left, right), (right, left)):
            if hasattr(side, "__len__") and isinstance(other, int) and len(side) * other > MAX_TEXT_CHARACTERS:
                raise _Budget(f"a text or list repeated {other} times")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes `<` and `&` for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise SourceInvalid(
            f"the chat template has {len(template)} characters, above {MAX_TEMPLATE_CHARACTERS}; "
            "use a model with a smaller one"
        )
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise SourceInvalid(
            f"the chat template cannot be read: {error}; correct chat_template.jinja of the source"
        ) from error


class _BoundedRange:
    """`range` for one rendering: all its steps together are bounded, however the loops are nested."""

    def __init__(self) -> None:
        self._steps_left = MAX_RANGE_STEPS

    def __call__(self, *bounds: int) -> range:
        steps = range(*bounds)
        # len() of a range beyond the machine's word raises OverflowError; this arithmetic never does.
        self._steps_left -= max(0, (steps.stop - steps.start) // steps.step)
        if self._steps_left < 0:
            raise _Budget(f"more than {MAX_RANGE_STEPS} steps of range")
        return steps


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    special: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    today: date | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Text of `messages` in the chat template, as transformers' apply_chat_template writes it.

    template: Jinja source of the template.
    add_generation_prompt: end with the opening of an assistant turn.
    special: texts of special tokens by their usual names, such as `{"bos_token": "<s>"}`.
    tools: JSON schemas of functions that the model may call.
    today: what `strftime_now` says; absent: the clock.
    variables: further names that the template may read.

    Raises SourceInvalid when the template is broken or does too much work, DatasetInvalid when it refuses the messages.
    """
    moment = datetime(today.year, today.month, today.day, tzinfo=UTC) if today else datetime.now()
    context = {
        **(special or {}),
        **(variables or {}),
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
        "documents": None,
        "range": _BoundedRange(),
        "strftime_now": moment.strftime,
    }
    try:
        return _joined(_compiled(template).generate(context))
    except _Refusal as refusal:
        raise DatasetInvalid(f"the chat template refuses the messages: {refusal}; change the row") from refusal
    except _Budget as excess:
        raise SourceInvalid(f"the chat template does too much work ({excess}); correct chat_template.jinja") from excess
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise SourceInvalid(
            f"the chat template cannot be rendered: {type(error).__name__}: {error}; correct chat_template.jinja"
        ) from error


def _joined(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_TEXT_CHARACTERS:
            raise _Budget(f"more than {MAX_TEXT_CHARACTERS} characters of text")
        kept.append(piece)
    return "".join(kept)


def assistant_spans(
    template: str,
    messages: Sequence[Message],
    *,
    special: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    today: date | None = None,
) -> tuple[str, list[Span]]:
    """The whole text, and where in it the assistant's turns are.

    A span holds what the assistant writes: its text and the end-of-turn token, not the line break that the template
    puts behind it.

    Raises DatasetInvalid when the template opens no turn for the assistant that is a prefix of the whole text.
    """

    def shown(upto: int, add_generation_prompt: bool) -> str:
        return render(
            template,
            messages[:upto],
            add_generation_prompt=add_generation_prompt,
            special=special,
            tools=tools,
            today=today,
        )

    text = shown(len(messages), add_generation_prompt=False)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DatasetInvalid("the first message is the assistant's; begin with a user or system message")
        before = shown(index, add_generation_prompt=True)
        after = text if index == len(messages) - 1 else shown(index + 1, add_generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DatasetInvalid(
                f"the chat template is not prefix-consistent: it writes the turns before or at message {index + 1} "
                "differently once more follows, so what the assistant wrote cannot be told apart; "
                "split the row after each assistant message, or use a model whose template keeps earlier turns"
            )
        end = len(after.rstrip())
        # A template without an end-of-turn token: the text's own blanks at its end still belong to the assistant.
        content = message.get("content") or ""
        if after.startswith(content, len(before)):
            end = max(end, len(before) + len(content))
        spans.append((len(before), end))
    return text, spans


def prints_tool_calls(template: str, *, special: Mapping[str, str] | None = None) -> bool:
    """Whether the template writes an assistant's `tool_calls` into the text at all."""
    name = f"{_PROBE}_tool"
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {"city": _PROBE}}}
    tool = {
        "type": "function",
        "function": {"name": name, "description": _PROBE, "parameters": {"type": "object", "properties": {}}},
    }
    messages: list[Message] = [
        {"role": "user", "content": _PROBE},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _PROBE, "name": name, "tool_call_id": "call00001"},
    ]
    bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    try:
        return render(template, messages, special=special, tools=[tool]) != render(
            template, bare, special=special, tools=[tool]
        )
    except (DatasetInvalid, SourceInvalid):
        return False


def turn_end(template: str, tokenizer: Tokenizer, *, special: Mapping[str, str] | None = None) -> int | None:
    """Id of the token that the template writes after an assistant's text; a model served without it never stops.

    None when the template writes no single special token there.
    """
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        text, spans = assistant_spans(template, messages, special=special)
    except (DatasetInvalid, SourceInvalid):
        return None
    start, end = spans[0]
    written = text[start:end]
    ending = written[written.rfind(_PROBE) + len(_PROBE) :].strip()
    if not ending:
        return None
    token = tokenizer.token_to_id(ending)
    if token is not None:
        return int(token)
    ids = tokenizer.encode(ending, add_special_tokens=False).ids
    return int(ids[0]) if len(ids) == 1 else None
