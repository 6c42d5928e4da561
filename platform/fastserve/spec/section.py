"""The base of every block of the manifest, and the scalar types with units.

Each scalar type carries a `Form`: what it is called in messages and in the reference page. So one definition decides
what is read, what is written back, what editors show and what an error says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    StringConstraints,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from fastserve import units

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_LARGEST_WHOLE = 2**63 - 1


class Section(BaseModel):
    """A closed, frozen block: camelCase in the manifest, snake_case in Python; an unknown key is an error."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


@dataclass(frozen=True, slots=True)
class Form:
    """What a scalar type is called where people read of it."""

    words: str
    """In a sentence behind `must be a ...`: `whole number`."""

    example: str
    """As it stands in a manifest."""

    write: Callable[[Any], str] | None = None
    """Turns a value back into the manifest's text; None: the value is written as it is."""

    number: bool = False
    """Whether the manifest writes it as a plain number."""


def wrong_at(key: str, message: str) -> PydanticCustomError:
    """An error of a block that is really one key's: raise it in a validator, and the message names that key."""
    return PydanticCustomError("wrong_at", "{message}", {"at": key, "message": message})


def _with_unit(parse: Callable[[str], Any], form: Form, pattern: str) -> BeforeValidator:
    """Takes text with a unit and nothing else; editors are shown `pattern`."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return parse(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{_shown(value)} is not a {form.words}; write it like {form.example}")
        raise ValueError(f"{value} has no unit; write it like {form.example}")

    schema = Annotated[str, Field(pattern=pattern, examples=form.example.split(" or "))]
    return BeforeValidator(read, json_schema_input_type=schema)


_DIGITS = r"^\s*[0-9]+(\.[0-9]+)?\s*"
_DURATION = rf"{_DIGITS}({'|'.join(units.DURATION_UNITS)})\s*$"
_SIZE = rf"{_DIGITS}({'|'.join(units.SIZE_UNITS)})\s*$"
_SHARE = rf"{_DIGITS}%\s*$"

_DURATION_FORM = Form("duration", "500ms or 2m", units.write_duration)
_SIZE_FORM = Form("size", "24GiB", units.write_bytes)
_SHARE_FORM = Form("percentage", "5%", units.write_share)

Duration = Annotated[
    float,
    _with_unit(units.parse_duration, _DURATION_FORM, _DURATION),
    PlainSerializer(units.write_duration, return_type=str),
    _DURATION_FORM,
]
"""Seconds, written with a unit."""

Bytes = Annotated[
    int,
    _with_unit(units.parse_bytes, _SIZE_FORM, _SIZE),
    PlainSerializer(units.write_bytes, return_type=str),
    _SIZE_FORM,
]
"""Bytes, written with a unit."""

Share = Annotated[
    float,
    _with_unit(units.parse_share, _SHARE_FORM, _SHARE),
    PlainSerializer(units.write_share, return_type=str),
    _SHARE_FORM,
]
"""A share, 1 is all, written as a percentage."""


def _whole(value: Any) -> Any:
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value} is not a whole number; write digits, such as 100 or 1e5")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{_shown(value)} is not a whole number; write digits without quotes, such as 100 or 1e5")
    if abs(value) > _LARGEST_WHOLE:
        raise ValueError(f"{value} is too large; write at most {_LARGEST_WHOLE}")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_shown(value)} is not a number; write it without quotes, such as 0.1 or 2e-4")
    return value


def _plain(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{_shown(value)} is not a number, a flag or a text; write one of them, such as 4 or true")
    return value


def _day(value: Any) -> Any:
    if isinstance(value, date):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        try:
            return date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"'{value}' is not in the calendar; write a day as YYYY-MM-DD") from None
    raise ValueError(f"{_shown(value)} is not a day; write it as YYYY-MM-DD, such as 2027-06-30")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else str(value)


Whole = Annotated[
    int, BeforeValidator(_whole, json_schema_input_type=int), Form("whole number", "100 or 1e5", number=True)
]
"""A whole number of at most 64 bits; `1e5` and `2e8` count."""

Positive = Annotated[Whole, Field(ge=1)]
"""A whole number from 1."""

Number = Annotated[
    float,
    BeforeValidator(_number, json_schema_input_type=float),
    Field(allow_inf_nan=False),
    Form("number", "0.1 or 2e-4", number=True),
]
"""A number; `2e-4` counts."""

Flag = Annotated[bool, Strict()]
"""true or false; the text `"yes"` is neither, here as on a cluster."""

Plain = Annotated[
    bool | int | float | str,
    BeforeValidator(_plain, json_schema_input_type=bool | int | float | str),
    Form("plain value", "4, true or silu"),
]
"""A plain value of somebody else's configuration, handed on as it is."""

Day = Annotated[
    date, BeforeValidator(_day), WithJsonSchema({"type": "string", "format": "date"}), Form("day", "2027-06-30")
]
"""A day as YYYY-MM-DD."""

Name = Annotated[
    str,
    StringConstraints(pattern=NAME_PATTERN, max_length=63),
    WithJsonSchema({"type": "string", "pattern": NAME_PATTERN, "maxLength": 63}),
    Form("name", "support-chat"),
]
"""A DNS-1123 label (RFC 1123): lower-case letters, digits and `-`, at most 63."""


def is_name(text: str) -> bool:
    """Whether `text` is a DNS-1123 label."""
    return len(text) <= 63 and re.fullmatch(NAME_PATTERN, text) is not None
