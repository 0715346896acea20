"""The models that the server has by name: loaded when first asked for, unloaded when others need the memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from torchchat_core.amounts import bytes_text
from torchchat_core.errors import TorchchatError, did_you_mean
from torchchat_core.pipeline import ModelRequest, fetch_files
from torchchat_core.plugins import Registry
from torchchat_core.server.engine import Engine
from torchchat_core.server.errors import ApiError
from torchchat_core.server.limits import Limits
from torchchat_core.server.metrics import Metrics


@dataclass(eq=False)
class Entry:
    """One model, and whether it is loaded."""

    name: str
    request: ModelRequest
    created: int = field(default_factory=lambda: int(time.time()))
    engine: Engine | None = None
    users: int = 0  # requests that are using it now
    used_at: float = 0.0
    bytes: int = 0  # of its weights, while it is loaded


class Shelf:
    """Belongs to the event loop."""

    def __init__(self, requests: Mapping[str, ModelRequest], registry: Registry, limits: Limits, metrics: Metrics
                 ) -> None:
        self.entries = {name: Entry(name, request) for name, request in requests.items()}
        self._registry, self._limits, self._metrics = registry, limits, metrics
        self._changing = asyncio.Lock()  # one model is loaded at a time
        self._released = asyncio.Event()

    @property
    def loaded(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.engine is not None]

    def find(self, name: str) -> Entry:
        """Raises `ApiError` 404 for a model that is not here."""
        if name not in self.entries:
            hint = did_you_mean(name[:200], self.entries) or f"known are {', '.join(self.entries)}"
            raise ApiError(404, f"the model {name[:200]!r} does not exist; {hint}", "model", "model_not_found")
        return self.entries[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """The model's engine; it stays loaded within. Raises `ApiError` where it cannot be had."""
        entry = self.find(name)
        entry.users += 1
        try:
            async with asyncio.timeout(self._limits.max_time):
                engine = await self._loaded(entry)
            entry.used_at = time.monotonic()
            yield engine
        except TimeoutError:
            raise ApiError(504, f"there was no time left for the model {name!r}", code="timeout") from None
        finally:
            entry.users -= 1
            entry.used_at = time.monotonic()
            self._released.set()

    async def close(self) -> None:
        for entry in self.loaded:
            await self._unload(entry)

    async def _loaded(self, entry: Entry) -> Engine:
        async with self._changing:
            if entry.engine is None:
                await self._make_room(entry)
                engine = Engine(entry.request, self._registry, self._limits, self._metrics)
                try:
                    await engine.ready()
                except TorchchatError as error:
                    raise ApiError(503, f"the model {entry.name!r} cannot be loaded: {error}") from error
                entry.engine = engine
                entry.bytes = engine.opened.weight_bytes
            return entry.engine

    async def _make_room(self, entry: Entry) -> None:
        """Unloads the models that were not used for longest, until this one fits."""
        limit = self._limits.memory_limit << 20
        if not limit:
            return
        needed = await asyncio.to_thread(self._size, entry.request)
        if needed > limit:
            raise ApiError(503, f"the model {entry.name!r} takes {bytes_text(needed)}; the server may use "
                                f"{bytes_text(limit)} (--memory-limit)")
        while sum(other.bytes for other in self.loaded) + needed > limit:
            idle = [other for other in self.loaded if not other.users]
            if idle:
                await self._unload(min(idle, key=lambda other: other.used_at))
            else:
                self._released.clear()
                await self._released.wait()

    def _size(self, request: ModelRequest) -> int:
        """Bytes of the weights as they are stored, which is about what they take."""
        try:
            return sum(path.stat().st_size for path in fetch_files(request, self._registry).weights)
        except (TorchchatError, OSError) as error:
            raise ApiError(503, f"the model cannot be loaded: {error}") from error

    @staticmethod
    async def _unload(entry: Entry) -> None:
        engine, entry.engine, entry.bytes = entry.engine, None, 0
        if engine is not None:
            await engine.close()
