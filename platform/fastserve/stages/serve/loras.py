"""The adapters of a running engine: made to be those that are wanted, without touching the others or the base model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger("fastserve.serve")


class Loras:
    """Loads and unloads adapters through the registry of vLLM's own server, in which its routes look names up."""

    def __init__(self, engine: Any, models: Any) -> None:
        """engine: vLLM's asynchronous client. models: `openai_serving_models` of the application's state."""
        self._engine = engine
        self._models = models
        self._one_at_a_time = asyncio.Lock()

    async def make(self, wanted: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Have exactly `wanted` adapters: `name`, and `path` of a folder whose content never changes.

        Returns `name` and `why` of those that the engine refuses; all others are served. An adapter under another path
        takes its name over; requests that run go on with what they began with.
        """
        async with self._one_at_a_time:
            paths = {adapter["name"]: adapter["path"] for adapter in wanted}
            for name in [name for name in self._models.lora_requests if name not in paths]:
                await self._unload(name)
            refused = []
            for name, path in paths.items():
                why = await self._load(name, path)
                if why:
                    refused.append({"name": name, "why": why})
            return refused

    async def _load(self, name: str, path: str) -> str:
        """Load one adapter, if it is not; why it cannot be served, else nothing."""
        from vllm.lora.request import LoRARequest

        had = self._models.lora_requests.get(name)
        if had is not None and had.lora_path == path:
            return ""
        # Its own number: the engine must not mix its matrices with those of the one that had the name before.
        number = self._models.lora_id_counter.inc(1)
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        try:
            await self._engine.add_lora(request)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one, the model and the others go on
            with contextlib.suppress(Exception):
                await self._engine.remove_lora(number)
            log.error("adapter %s is not served, the engine refuses it: %s", name, error)
            return str(error) or type(error).__name__
        self._models.lora_requests[name] = request
        log.info("adapter %s is served", name)
        if had is not None:
            await self._engine.remove_lora(had.lora_int_id)
        return ""

    async def _unload(self, name: str) -> None:
        """New requests do not find it any more; the engine reads it again for one that still runs."""
        request = self._models.lora_requests.pop(name)
        await self._engine.remove_lora(request.lora_int_id)
        log.info("adapter %s is no longer served", name)
