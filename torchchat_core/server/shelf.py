"""The models that the server has by name: loaded when first asked for, unloaded when others need the memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from torchchat_core.amounts import bytes_text
from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.pipeline import ModelRequest, fetch_files
from torchchat_core.plugins import Registry
from torchchat_core.server.engine import Engine
from torchchat_core.server.errors import STOPPING, ApiError
from torchchat_core.server.limits import Limits
from torchchat_core.server.metrics import Metrics

LAST_STEP = 5.0  # seconds that a model has for it when the server ends
PATIENCE = 1.0  # seconds that a model waits for room before nobody new may use those that are in its way


@dataclass(eq=False)
class Entry:
    """One model, and whether it is loaded."""

    name: str
    request: ModelRequest
    created: int = field(default_factory=lambda: int(time.time()))
    engine: Engine | None = None
    loading: asyncio.Task[Engine] | None = None  # shared by all who wait, and not ended by one who leaves
    waiting: int = 0  # requests that wait for it to be loaded
    users: int = 0  # requests that are using it now
    used_at: float = 0.0
    rooms: int = 0  # places in memory: from when room is made for it until it is given back
    asked_at: float = 0.0  # when it began to wait for room
    bytes: int = 0  # of its weights: from when room is made for them until they are given back


class Shelf:
    """Belongs to the event loop."""

    def __init__(self, requests: Mapping[str, ModelRequest], registry: Registry, limits: Limits, metrics: Metrics
                 ) -> None:
        self.entries = {name: Entry(name, request) for name, request in requests.items()}
        self._registry, self._limits, self._metrics = registry, limits, metrics
        self._changing = asyncio.Lock()  # one model is loaded at a time
        self._changed = asyncio.Event()  # that there may be room now, or that a request waits no longer
        self._queue: list[Entry] = []  # that wait for room, the first one first

    @property
    def loaded(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.engine is not None]

    def add(self, name: str, request: ModelRequest) -> None:
        """One more model, loaded when it is first asked for; nothing where there is one of that name."""
        self.entries.setdefault(name, Entry(name, request))

    def find(self, name: str) -> Entry:
        """Raises `ApiError` 404 for a model that is not here."""
        if name not in self.entries:
            hint = did_you_mean(name[:200], self.entries) or f"known are {', '.join(self.entries)}"
            raise ApiError(404, f"the model {quoted(name)} does not exist; {hint}", "model", "model_not_found")
        return self.entries[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """The model's engine; it stays loaded within. Raises `ApiError` where it cannot be had."""
        engine = await self.take(name)
        try:
            yield engine
        finally:
            self.give_back(name)

    async def take(self, name: str) -> Engine:
        """The model's engine, which stays loaded until `give_back`. Raises `ApiError` where it cannot be had."""
        entry = self.find(name)
        try:
            async with asyncio.timeout(self._limits.max_time):
                return await self._taken(entry)
        except TimeoutError:
            raise ApiError(504, f"there was no time left for the model {quoted(name)}", code="timeout") from None

    def take_loaded(self, name: str) -> Engine | None:
        """The same where the model is loaded and nothing has to be waited for; else None."""
        entry = self.find(name)
        if entry.engine is None or entry.engine.broken or self._is_closed():
            return None
        return self._used(entry, entry.engine)

    def give_back(self, name: str) -> None:
        """For each `take`, once."""
        entry = self.entries[name]
        entry.users -= 1
        entry.used_at = time.monotonic()
        self._changed.set()

    async def close(self) -> None:
        for entry in self.entries.values():
            if entry.loading is not None:
                entry.loading.cancel()
                await asyncio.wait({entry.loading})
            await self._unload(entry, LAST_STEP)

    async def _taken(self, entry: Entry) -> Engine:
        """The engine of an entry, whose user the caller is from then on: nothing is awaited between the two."""
        while entry.engine is not None and self._is_closed():
            await self._change()
        if entry.engine is not None and entry.engine.broken:
            await self._unload(entry)  # and have it loaded anew
        if entry.engine is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
                entry.loading.add_done_callback(_seen)
            entry.waiting += 1
            try:
                engine = await asyncio.shield(entry.loading)
            finally:
                entry.waiting -= 1
                self._changed.set()
        else:
            engine = entry.engine
        return self._used(entry, engine)

    @staticmethod
    def _used(entry: Entry, engine: Engine) -> Engine:
        entry.users += 1
        entry.used_at = time.monotonic()
        return engine

    async def _load(self, entry: Entry) -> Engine:
        try:
            needed = await self._make_room(entry)
            try:
                async with self._changing:
                    engine = await self._started(entry)
            except BaseException:
                entry.bytes -= needed
                entry.rooms -= 1
                self._changed.set()
                raise
            entry.bytes += engine.opened.weight_bytes - needed
            entry.engine, entry.used_at = engine, time.monotonic()
            return engine
        finally:
            entry.loading = None

    async def _started(self, entry: Entry) -> Engine:
        engine = Engine(entry.request, self._registry, self._limits, self._metrics)
        try:
            await engine.ready()
        except BaseException as error:  # panics in Rust libraries are not an `Exception`
            await engine.close()
            if isinstance(error, STOPPING):
                raise
            raise ApiError(503, f"the model {quoted(entry.name)} cannot be loaded: {error or type(error).__name__}"
                           ) from error
        return engine

    async def _make_room(self, entry: Entry) -> int:
        """Unloads the models that were not used for longest, until this one fits; the bytes that are reserved for it.

        Models get room in the order in which they ask. Waits without a lock: those who use what is loaded are what it
        waits for.
        """
        limit = self._limits.memory_limit << 20
        needed = await asyncio.to_thread(self._size, entry.request) if limit else 0
        if needed > limit:
            raise ApiError(503, f"the model {quoted(entry.name)} takes {bytes_text(needed)}; the server may use "
                                f"{bytes_text(limit)} (--memory-limit)")
        entry.asked_at = time.monotonic()
        self._queue.append(entry)
        try:
            while self._queue[0] is not entry or self._crowded(needed):
                idle = [other for other in self.loaded if not other.users and not other.waiting]
                if not entry.waiting:
                    raise ApiError(503, f"nobody waits for the model {quoted(entry.name)} any more")
                if self._queue[0] is entry and idle:
                    await self._unload(min(idle, key=lambda other: other.used_at))
                else:
                    await self._change()
            entry.bytes += needed
            entry.rooms += 1
            return needed
        finally:
            self._queue.remove(entry)
            self._changed.set()

    def _is_closed(self) -> bool:
        """Whether a model has waited for room for so long that those who come now have to let it pass."""
        return bool(self._queue) and time.monotonic() - self._queue[0].asked_at > PATIENCE

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _crowded(self, needed: int) -> bool:
        """Whether one more model, of so many bytes, is too much."""
        limit, most = self._limits.memory_limit << 20, self._limits.max_loaded
        if limit and sum(other.bytes for other in self.entries.values()) + needed > limit:
            return True
        return bool(most) and sum(other.rooms for other in self.entries.values()) >= most

    def _size(self, request: ModelRequest) -> int:
        """Bytes of the weights as they are stored, which is about what they take."""
        try:
            return sum(path.stat().st_size for path in fetch_files(request, self._registry).weights)
        except (TorchchatError, OSError) as error:
            raise ApiError(503, f"the model cannot be loaded: {error}") from error

    async def _unload(self, entry: Entry, patience: float | None = None) -> None:
        engine, entry.engine = entry.engine, None
        if engine is not None:
            freed = entry.bytes
            try:
                await engine.close(patience)
            finally:
                entry.bytes -= freed
                entry.rooms -= 1
                self._changed.set()


def _seen(loading: asyncio.Task[Engine]) -> None:
    """Takes note of an error that nobody waits for any more, so that it is not reported as lost."""
    if not loading.cancelled():
        loading.exception()
