"""Adapters made to be those that are wanted, over an engine that refuses some."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastserve.stages.serve.loras import Loras


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Engine:
    """Loads every adapter but those whose path begins with /bad."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.calls = 0

    async def add_lora(self, request: LoRARequest) -> bool:
        self.calls += 1
        await asyncio.sleep(0)
        if request.lora_path.startswith("/bad"):
            raise ValueError("shapes differ")
        self.held[request.lora_int_id] = request.lora_path
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.held.pop(number, None) is not None


class Numbers:
    def __init__(self) -> None:
        self.last = 0

    def inc(self, by: int) -> int:
        self.last += by
        return self.last


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    module = ModuleType("vllm.lora.request")
    module.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    return Engine()


def _make(engine: Engine, *lists: Sequence[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Names and paths served after each list was wanted, and what the last one had refused. `a=/x` is one adapter."""
    models: Any = SimpleNamespace(lora_requests={}, lora_id_counter=Numbers())
    loras, refused = Loras(engine, models), []

    async def run() -> None:
        nonlocal refused
        for wanted in lists:
            pairs = [item.split("=") for item in wanted]
            refused = await loras.make([{"name": name, "path": path} for name, path in pairs])

    asyncio.run(run())
    return {name: request.lora_path for name, request in models.lora_requests.items()}, refused


def test_asking_twice_loads_once(engine: Engine) -> None:
    served, refused = _make(engine, ["a=/x", "b=/y"], ["a=/x", "b=/y"])
    assert (served, refused, engine.calls) == ({"a": "/x", "b": "/y"}, [], 2)


def test_what_is_not_wanted_any_more_leaves_the_engine(engine: Engine) -> None:
    served, _ = _make(engine, ["a=/x", "b=/y"], ["b=/y"])
    assert served == {"b": "/y"}
    assert list(engine.held.values()) == ["/y"]


def test_a_bad_one_is_reported_and_the_others_are_served(engine: Engine) -> None:
    served, refused = _make(engine, ["a=/x", "bad=/bad", "b=/y"])
    assert served == {"a": "/x", "b": "/y"}
    assert refused == [{"name": "bad", "why": "shapes differ"}]


def test_other_bytes_take_the_name_over_under_a_number_of_their_own(engine: Engine) -> None:
    served, _ = _make(engine, ["a=/x"], ["a=/z"])
    assert served == {"a": "/z"}
    assert engine.held == {2: "/z"}


def test_what_cannot_be_replaced_stays(engine: Engine) -> None:
    served, refused = _make(engine, ["a=/x"], ["a=/bad"])
    assert served == {"a": "/x"}
    assert refused[0]["name"] == "a"
    assert engine.held == {1: "/x"}
