"""A look at a safetensors header before any library trusts it.

The format (github.com/huggingface/safetensors, README "Format"): eight bytes little-endian N, N bytes of JSON, then
the tensors' bytes. The header says how much to allocate and where to read, so it is checked first, in bounded time and
memory: a length of 2^63 is refused after eight bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastserve.errors import SourceInvalid

HEADER_LIMIT_BYTES = 25 * 10**6
TENSOR_LIMIT = 10**6
_DIMENSION_LIMIT = 64
_SIZE_LIMIT = 2**63

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, by the format's names."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""

    end: int
    """One past the last byte."""

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a checked file holds."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header_bytes: int
    """Bytes before the first tensor: the length field and the JSON."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.begin for info in self.tensors.values())


def check(path: Path, name: str | None = None) -> Header:
    """The header of a .safetensors file whose every claim holds.

    name: what to call the file in messages; its own name when left out.
    Raises SourceInvalid: header too long, not inside the file or no JSON; a name given twice; an unknown dtype; offsets
    that leave the file, overlap, leave a hole or do not fit the shape.
    """
    shown = name or path.name
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        if len(length_field) < 8:
            raise _torn(shown, f"has only {size_bytes} bytes")
        (length,) = struct.unpack("<Q", length_field)
        if length > HEADER_LIMIT_BYTES:
            raise _torn(shown, f"says its header has {length} bytes; at most {HEADER_LIMIT_BYTES} are read")
        if 8 + length > size_bytes:
            raise _torn(shown, f"says its header has {length} bytes, but the file has only {size_bytes}")
        text = file.read(length)
    return _checked(text, size_bytes - 8 - length, shown)


def header_length(head: bytes, name: str) -> int:
    """Bytes of the whole header, from a file's first eight bytes. Raises SourceInvalid when it is too long."""
    if len(head) < 8:
        raise _torn(name, f"has only {len(head)} bytes")
    (length,) = struct.unpack("<Q", head[:8])
    if length > HEADER_LIMIT_BYTES:
        raise _torn(name, f"says its header has {length} bytes; at most {HEADER_LIMIT_BYTES} are read")
    return 8 + int(length)


def _checked(text: bytes, data_bytes: int, shown: str) -> Header:
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, shown))
    except (ValueError, RecursionError) as error:
        raise _torn(shown, f"has a header that is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise _torn(shown, "has a header that is not a JSON object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _torn(shown, "has a __metadata__ that is not text by text")
    if len(raw) > TENSOR_LIMIT:
        raise _torn(shown, f"lists {len(raw)} tensors; at most {TENSOR_LIMIT} are read")
    tensors = {tensor: _tensor(tensor, value, shown) for tensor, value in raw.items()}
    _check_layout(tensors, data_bytes, shown)
    return Header(tensors=tensors, metadata=metadata, header_bytes=8 + len(text))


def _tensor(tensor: str, value: Any, shown: str) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _torn(shown, f"describes tensor '{tensor}' by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _torn(shown, f"gives tensor '{tensor}' the unknown dtype {dtype!r}")
    if not _whole_numbers(shape) or len(shape) > _DIMENSION_LIMIT:
        raise _torn(shown, f"gives tensor '{tensor}' a shape that is none")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _torn(shown, f"gives tensor '{tensor}' data_offsets that are not two whole numbers")
    begin, end = offsets
    elements = 1
    for size in shape:
        elements *= size
        if elements >= _SIZE_LIMIT:
            raise _torn(shown, f"gives tensor '{tensor}' more elements than a file can hold")
    bits = elements * DTYPE_BITS[dtype]
    if begin > end or bits % 8 or end - begin != bits // 8:
        raise _torn(shown, f"gives tensor '{tensor}' {end - begin} bytes, but its shape and dtype need {bits / 8:g}")
    return TensorInfo(dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int, shown: str) -> None:
    reached, before = 0, "the header"
    for tensor, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.end > data_bytes:
            raise _torn(
                shown, f"puts tensor '{tensor}' up to byte {info.end}, but only {data_bytes} bytes follow the header"
            )
        if info.begin < reached:
            raise _torn(shown, f"lets tensor '{tensor}' overlap with '{before}'")
        if info.begin > reached:
            raise _torn(shown, f"leaves {info.begin - reached} unused bytes before tensor '{tensor}'")
        reached, before = info.end, tensor
    if reached != data_bytes:
        raise _torn(shown, f"has {data_bytes - reached} bytes that belong to no tensor")


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value)


def _unique(pairs: list[tuple[str, Any]], shown: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _torn(shown, f"gives '{twice}' twice")
    return found


def _torn(shown: str, what: str) -> SourceInvalid:
    return SourceInvalid(f"'{shown}' {what}; the file is torn or forged: fetch it again or replace it")


def check_index(index: Mapping[str, Any], shards: Mapping[str, Header], name: str) -> None:
    """Raise SourceInvalid unless an index names exactly the tensors of the shards that are there.

    index: the parsed `*.safetensors.index.json`. shards: checked headers by file name, beside the index.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise SourceInvalid(f"'{name}' has no weight_map of file names; fetch it again or replace it")
    for tensor, shard in weight_map.items():
        if shard not in shards:
            raise SourceInvalid(
                f"'{name}' names the file '{shard}', which is not there; fetch the model again, all of it"
            )
        if tensor not in shards[shard].tensors:
            raise SourceInvalid(
                f"'{name}' looks for '{tensor}' in '{shard}', which does not hold it; fetch the model again"
            )


def total(headers: Mapping[str, Header]) -> tuple[int, int]:
    """Parameters and bytes of several files together."""
    parameters = sum(info.elements for header in headers.values() for info in header.tensors.values())
    return parameters, sum(header.weight_bytes for header in headers.values())
