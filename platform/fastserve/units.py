"""Numbers with units, read and printed one way everywhere.

The manifest writes `500ms`, `24GiB`, `5%`, `2e8`; code keeps seconds, bytes, shares and whole numbers, with the unit in
the name. Decimal (kB, MB, GB) and binary (KiB, MiB, GiB) sizes both exist and are never mixed up.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    # Kubernetes quantities, so that a value copied from a pod spec means the same here.
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_TOO_LARGE = 2**63
"""Sizes stay in a signed 64-bit integer, as Kubernetes keeps them."""

DURATION_UNITS = tuple(_SECONDS)
SIZE_UNITS = tuple(_BYTES)

_BLANKS = r"[ \t\n\f\r]*"
"""What `\\s*` is to an API server (RE2): a pattern there and this reader take the same texts."""

_QUANTITY = re.compile(rf"{_BLANKS}([0-9]+(?:\.[0-9]+)?){_BLANKS}([A-Za-z%]+){_BLANKS}")


def parse_duration(text: str) -> float:
    """Seconds in `500ms`, `90s`, `2m`, `1h`, `30d`.

    Raises ValueError that names the units, and for `1:30` says `90s`.
    """
    clock = re.fullmatch(r"([0-9]{1,6}):([0-5][0-9])(?::([0-5][0-9]))?", text.strip())
    if clock:
        parts = [int(part) for part in clock.groups() if part is not None]
        seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
        raise ValueError(f"'{text}' could be minutes or hours; write {seconds}s")
    match = _QUANTITY.fullmatch(text)
    if not match or match[2] not in _SECONDS:
        raise ValueError(f"'{text}' is not a duration; write a number with ms, s, m, h or d, such as 500ms or 2m")
    return _finite(float(match[1]) * _SECONDS[match[2]], text)


def parse_bytes(text: str) -> int:
    """Bytes in `24GiB`, `500MB`, `32Gi`. Raises ValueError that names the units."""
    match = _QUANTITY.fullmatch(text)
    if not match or match[2] not in _BYTES:
        raise ValueError(
            f"'{text}' is not a size; write a number with KiB, MiB, GiB, TiB (or kB, MB, GB, TB), such as 24GiB"
        )
    size = Decimal(match[1]) * _BYTES[match[2]]
    if size >= _TOO_LARGE:
        raise ValueError(f"'{text}' is too large; write a smaller number")
    return round(size)


def parse_share(text: str) -> float:
    """Share in `5%` (0.05). Raises ValueError that shows the form."""
    match = _QUANTITY.fullmatch(text)
    if not match or match[2] != "%":
        raise ValueError(f"'{text}' is not a percentage; write a number with %, such as 5%")
    return _finite(float(Decimal(match[1]) / 100), text)


def write_duration(seconds: float) -> str:
    """Text that `parse_duration` reads as exactly `seconds`, in the largest unit that does it."""
    for unit, size in reversed(_SECONDS.items()):
        count = round(seconds / size)
        if count and count * size == seconds:
            return f"{count}{unit}"
    return f"{_digits(seconds)}s"


def write_bytes(size_bytes: int) -> str:
    """Text that `parse_bytes` reads as exactly `size_bytes`: `24GiB`, `500MB`, `17B`."""
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"):
        if size_bytes and size_bytes % _BYTES[unit] == 0:
            return f"{size_bytes // _BYTES[unit]}{unit}"
    return f"{size_bytes}B"


def write_share(share: float) -> str:
    """Text that `parse_share` reads as exactly `share`: `0.05` as `5%`."""
    return f"{_plain(Decimal(repr(share)) * 100)}%"


def show_duration(seconds: float) -> str:
    """`0.5` as `500ms`, `90` as `1m30s`, `7260` as `2h1m`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 10:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m" + (f"{whole % 60}s" if whole % 60 else "")
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}h" + (f"{minutes}m" if minutes else "")


def show_bytes(size_bytes: float) -> str:
    """`269060552` as `257 MiB`: binary units, three figures."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def show_share(share: float) -> str:
    """`0.05` as `5%`."""
    return f"{share * 100:.3g}%"


def _finite(value: float, text: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"'{text}' is too large; write a smaller number")
    return value


def _digits(value: float) -> str:
    """Shortest digits of a float without an exponent."""
    return _plain(Decimal(repr(value)))


def _plain(value: Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
