"""Rows as people write them, turned once, at the door, into one plain form.

Editors put marks in front, parquet invents nulls, exports hide lists in text: all of that ends here. What comes out is
the same value whichever file it came from, and whatever cannot be read is refused with its file and line.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.data.parquet import parquet_rows
from fastserve.data.running_text import BYTE_ORDER_MARK
from fastserve.data.running_text import SUFFIXES as TEXT_SUFFIXES
from fastserve.data.running_text import marked as _marked
from fastserve.errors import DatasetInvalid, SourceNotFound
from fastserve.plan.digest import canonical

SUFFIXES = (".jsonl", ".parquet", *TEXT_SUFFIXES)
ROLES = ("system", "developer", "user", "assistant", "tool")

_PROMPTS = ("instruction", "prompt")
_ANSWERS = ("output", "response", "completion")
_FORMS = "messages, or instruction/prompt with output/response/completion, or text"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: either a chat or plain text."""

    file: str
    """Name of the file it stands in, without its folder."""

    line: int
    """Line, or row of a parquet file, counted from 1."""

    messages: tuple[Mapping[str, Any], ...] = ()
    """Chat turns: role, content (always text), and tool_calls, tool_call_id, name where the row has them."""

    text: str = ""
    """Plain text; empty when there are messages."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else stood in the row."""

    @property
    def place(self) -> str:
        """`file:line`, as errors begin."""
        return f"{self.file}:{self.line}"

    @property
    def digest(self) -> str:
        """64 hex digits of what the row says; blanks, Unicode form and the file's format do not matter."""
        said: Any = self.text and _settled(self.text)
        if self.messages:
            said = [{key: _settled(item) for key, item in message.items()} for message in self.messages]
        return hashlib.sha256(canonical(said).encode()).hexdigest()


def _settled(value: Any) -> Any:
    """Texts with NFC form and single blanks, anywhere inside `value`."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, Mapping):
        return {key: _settled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settled(item) for item in value]
    return value


def data_files(path: Path) -> list[Path]:
    """The data files at `path`: itself, or all below it when it is a folder, in the order of their names.

    Raises SourceNotFound when nothing is there, DatasetInvalid when nothing there holds rows.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DatasetInvalid(f"{path.name}: no file with rows inside; put .jsonl, .parquet or .txt files there")
        return files
    if not path.exists():
        raise SourceNotFound(f"{path} is not there; correct the path of the data set")
    if path.suffix.lower() not in SUFFIXES:
        raise DatasetInvalid(
            f"{path.name}: files that end in '{path.suffix}' hold no rows; use .jsonl, .parquet or .txt"
        )
    return [path]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .parquet, .txt or .text file, or of all such files in a folder.

    Raises DatasetInvalid as `file:line: what; what to do`.
    """
    for file in data_files(path):
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            values: Iterator[tuple[int, Any]] = enumerate(parquet_rows(file), start=1)
        elif suffix == ".jsonl":
            values = _json_lines(file)
        else:
            values = ((number, {"text": line}) for number, line in _lines(file) if line.strip())
        for number, value in values:
            yield _row(file.name, number, value)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; the mark in front and CRLF are gone."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DatasetInvalid(f"{file.name}:1: the file is UTF-16; save it as UTF-8")
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DatasetInvalid(
                    f"{file.name}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from error
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if BYTE_ORDER_MARK in line:
                raise _marked(f"{file.name}:{number}")
            yield number, line


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    empty: int | None = None
    for number, line in _lines(file):
        if not line.strip():
            empty = empty or number
            continue
        if empty is not None:
            # Blank lines at the very end are an editor's habit; between rows one is a lost row.
            raise DatasetInvalid(f"{file.name}:{empty}: the row is empty; write a JSON object there or remove the line")
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DatasetInvalid(
                f"{file.name}:{number}: the row is not JSON{where}; write one JSON object on each line"
            ) from error


def _row(file: str, line: int, value: Any) -> Row:
    place = f"{file}:{line}"
    if not isinstance(value, dict):
        raise DatasetInvalid(f'{place}: the row is {_kind(value)}, not an object; write {{"messages": [...]}}')
    if not any(item not in (None, "", [], {}) for item in value.values()):
        raise DatasetInvalid(f"{place}: the row is empty; give it {_FORMS}, or remove the line")
    if value.get("messages") is not None:
        messages = _messages(place, value["messages"])
        return Row(file, line, messages=messages, extra=_without(value, "messages"))
    if any(value.get(key) is not None for key in _PROMPTS):
        return Row(
            file, line, messages=_instruction(place, value), extra=_without(value, *_PROMPTS, *_ANSWERS, "input")
        )
    if value.get("text") is not None:
        return Row(file, line, text=_text(place, "text", value["text"]), extra=_without(value, "text"))
    if "conversations" in value:
        raise DatasetInvalid(
            f"{place}: the row has conversations (from/value); write messages with role and content instead, "
            "human as user and gpt as assistant"
        )
    raise DatasetInvalid(f"{place}: the row has {', '.join(sorted(value))}, but needs {_FORMS}; rename its fields")


def _without(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in keys}


def _instruction(place: str, value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    prompt_key = next(key for key in _PROMPTS if value.get(key) is not None)
    answer_key = next((key for key in _ANSWERS if value.get(key) is not None), None)
    if answer_key is None:
        raise DatasetInvalid(f"{place}: the row has {prompt_key} but no answer; add output, response or completion")
    prompt = _text(place, prompt_key, value[prompt_key])
    if value.get("input"):
        prompt += "\n\n" + _text(place, "input", value["input"])
    answer = _text(place, answer_key, value[answer_key])
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def _messages(place: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DatasetInvalid(
                f"{place}: messages is text that is not JSON; store a list of messages in that column"
            ) from error
    if not isinstance(value, list):
        raise DatasetInvalid(
            f'{place}: messages is {_kind(value)}, not a list; write [{{"role": ..., "content": ...}}]'
        )
    if not value:
        raise DatasetInvalid(f"{place}: messages is empty; add messages or remove the row")
    return tuple(_message(f"{place}: message {number}", item) for number, item in enumerate(value, start=1))


def _message(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DatasetInvalid(f'{place} is {_kind(value)}, not an object; write {{"role": ..., "content": ...}}')
    if "from" in value and "role" not in value:
        raise DatasetInvalid(f"{place} has from/value; write role and content, human as user and gpt as assistant")
    role = value.get("role")
    if role not in ROLES:
        raise DatasetInvalid(f"{place} has role {role!r}; write one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role, "content": ""}
    calls = value.get("tool_calls") or []
    if value.get("content") is not None:
        message["content"] = _content(place, value["content"], may_be_empty=bool(calls) or role == "tool")
    elif not calls:
        raise DatasetInvalid(f"{place} ({role}) has no content; write its text")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise DatasetInvalid(f"{place} ({role}) has tool_calls; only an assistant message has a list of them")
        message["tool_calls"] = [_tool_call(place, call) for call in calls]
    for key in ("tool_call_id", "name", "reasoning_content"):
        if value.get(key) is not None:
            message[key] = _text(place, key, value[key])
    return message


def _tool_call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DatasetInvalid(f'{place} has a tool call without function.name; write {{"function": {{"name": ...}}}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        # OpenAI's form: an object written as text. Templates print either, but only one of them is a fixed point.
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DatasetInvalid(
                f'{place} has a tool call whose arguments are not JSON; write an object such as {{"city": "Oslo"}}'
            ) from error
    kept = {key: item for key, item in call.items() if item is not None and key != "function"}
    return {**kept, "function": {**function, "arguments": arguments}}


def _content(place: str, value: Any, may_be_empty: bool) -> str:
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if any(not isinstance(part, str) for part in parts):
            raise DatasetInvalid(f"{place} has content parts that are not text; only text is read, remove the others")
        value = "".join(part for part in parts if part is not None)
    return _text(place, "content", value, may_be_empty)


def _text(place: str, name: str, value: Any, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DatasetInvalid(f"{place}: {name} is {_kind(value)}, not text; write it as text")
    if not value.strip() and not may_be_empty:
        raise DatasetInvalid(f"{place}: {name} is empty; write its text or remove the row")
    if BYTE_ORDER_MARK in value:
        raise _marked(place)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetInvalid(
            f"{place}: {name} holds half of a surrogate pair, which is no character; remove it"
        ) from error
    return value.replace("\r\n", "\n")


def _kind(value: Any) -> str:
    names: Sequence[tuple[type, str]] = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "null" if value is None else "binary data")
