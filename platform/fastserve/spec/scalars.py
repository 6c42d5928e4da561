"""Plain scalars of YAML, read as kubectl reads them.

PyYAML's own table is another one: `2e-4` is text there, `1:30` is 90 and a date is an object. With two tables one file
would mean one thing on a laptop and another on a cluster. This table was measured with kubectl 1.32
(tests/data/yaml-scalars.json holds every form that was tried) and follows sigs.k8s.io/yaml, which makes JSON of YAML.
"""

from __future__ import annotations

import math
import re

Scalar = str | int | float | bool | None

_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON", "y", "Y"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF", "n", "N"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(
    r"(?P<sign>[-+]?)(?:0[xX](?P<hex>[0-9a-fA-F]+)|0[bB](?P<binary>[01]+)|0[oO]?(?P<octal>[0-7]+)"
    r"|(?P<decimal>0|[1-9][0-9]*))"
)
_BASES = {"hex": 16, "binary": 2, "octal": 8, "decimal": 10}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]*[0-9][0-9_]*")
_LONGEST_WHOLE = 64
"""Characters: more than any 64-bit integer has, and few enough for int() to be quick."""


def read_plain(text: str) -> Scalar:
    """The value of a scalar without quotes: `2e-4` is 0.0002, `0123` is 83, `no` is False, `1:30` is text.

    A whole number that needs more than 64 bits is a float, as it is for kubectl.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] == ".":
        return _float(text, text)
    if text[0] not in "+-0123456789":
        return text
    digits = text.replace("_", "")
    match = _WHOLE.fullmatch(digits) if len(digits) <= _LONGEST_WHOLE else None
    if match:
        base = next(name for name in _BASES if match[name] is not None)
        value = int(match["sign"] + match[base], _BASES[base])
        if -(2**63) <= value < 2**63:
            return value
    return _float(digits, text)


def is_octal_or_decimal(text: str) -> bool:
    """Whether a plain number begins with a zero that one reader minds and another does not: `0123`."""
    return _LEADING_ZERO.fullmatch(text) is not None


def _float(digits: str, text: str) -> float | str:
    if not _FLOAT.fullmatch(digits):
        return text
    value = float(digits)
    return value if math.isfinite(value) else text
