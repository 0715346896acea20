"""Models that make room for each other, and clients that leave while one is loaded."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import load_registry
from torchchat_core.server import shelf as shelf_module
from torchchat_core.server.errors import ApiError
from torchchat_core.server.limits import Limits
from torchchat_core.server.metrics import Metrics
from torchchat_core.server.shelf import Shelf

SIZE = 1 << 20


class FakeEngine:
    """An engine whose model comes when the test says so."""

    made: ClassVar[list[FakeEngine]] = []
    gate: ClassVar[asyncio.Event]
    error: ClassVar[Exception | None] = None

    def __init__(self, *_: Any) -> None:
        self.opened = SimpleNamespace(weight_bytes=SIZE)
        self.closed = False
        self.broken = False
        self.made.append(self)

    async def ready(self) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def close(self, _: float | None = None) -> None:
        await asyncio.sleep(0.01)
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(shelf_module, "Engine", FakeEngine)
    monkeypatch.setattr(Shelf, "_size", lambda *_: SIZE)
    FakeEngine.made, FakeEngine.error = [], None
    return FakeEngine


def new_shelf(**limits: Any) -> Shelf:
    FakeEngine.gate = asyncio.Event()
    FakeEngine.gate.set()
    return Shelf({name: ModelRequest(model=name) for name in "ab"}, load_registry(), Limits(**limits), Metrics())


async def used(shelf: Shelf, name: str, seconds: float = 0.0) -> None:
    async with shelf.use(name):
        await asyncio.sleep(seconds)


@pytest.mark.parametrize("limit", ["memory_limit", "max_loaded"])
def test_requests_for_two_models_of_which_one_fits_do_not_block_each_other(limit: str, fake: type[FakeEngine]) -> None:
    async def scenario() -> None:
        shelf = new_shelf(**{limit: 1})
        async with shelf.use("a"):
            other = asyncio.create_task(used(shelf, "b"))
            await asyncio.sleep(0.1)
            await used(shelf, "a")  # is there, whatever waits for room
        await other
        await asyncio.gather(*(used(shelf, name, 0.01) for name in "abab"))
        assert sum(not engine.closed for engine in fake.made) == 1
        assert sum(entry.bytes for entry in shelf.entries.values()) == SIZE
        await shelf.close()
        assert not any(entry.rooms for entry in shelf.entries.values())
        assert all(engine.closed for engine in fake.made)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_client_that_leaves_during_loading_leaves_the_model_to_the_next(fake: type[FakeEngine]) -> None:
    async def scenario() -> None:
        shelf = new_shelf(memory_limit=1)
        fake.gate.clear()
        first = asyncio.create_task(used(shelf, "a"))
        await asyncio.sleep(0.1)
        first.cancel()
        second = asyncio.create_task(used(shelf, "a"))
        await asyncio.sleep(0.1)
        fake.gate.set()
        await second
        assert len(fake.made) == 1
        assert shelf.entries["a"].users == shelf.entries["a"].waiting == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_nothing_is_loaded_for_a_client_that_left_while_it_waited_for_room(fake: type[FakeEngine]) -> None:
    async def scenario() -> None:
        shelf = new_shelf(memory_limit=1)
        async with shelf.use("a"):
            gone = asyncio.create_task(used(shelf, "b"))
            await asyncio.sleep(0.1)
            gone.cancel()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert [entry.name for entry in shelf.loaded] == ["a"]
        assert len(fake.made) == 1

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_model_that_fails_in_any_way_is_closed_and_its_room_is_free(fake: type[FakeEngine]) -> None:
    async def scenario() -> None:
        shelf = new_shelf(memory_limit=1)
        fake.error = RuntimeError("no memory")
        with pytest.raises(ApiError, match="no memory") as caught:
            await used(shelf, "a")
        assert caught.value.status == 503
        assert fake.made[0].closed
        fake.error = None
        await used(shelf, "b")

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_model_whose_thread_died_is_loaded_anew(fake: type[FakeEngine]) -> None:
    async def scenario() -> None:
        shelf = new_shelf(memory_limit=1, max_loaded=1)
        await used(shelf, "a")
        fake.made[0].broken = True
        await used(shelf, "a")
        assert [engine.closed for engine in fake.made] == [True, False]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_broken_model_that_several_find_leaves_the_count_of_models_right(fake: type[FakeEngine]) -> None:
    async def scenario() -> None:
        shelf = new_shelf(max_loaded=1)
        await used(shelf, "a")
        fake.made[0].broken = True
        await asyncio.gather(used(shelf, "a", 0.02), used(shelf, "a", 0.02))
        assert [entry.rooms for entry in shelf.entries.values()] == [1, 0]
        assert [engine.closed for engine in fake.made] == [True, False]
        await used(shelf, "b")
        assert [entry.name for entry in shelf.loaded] == ["b"]
        await shelf.close()
        assert not any(entry.rooms or entry.bytes for entry in shelf.entries.values())

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_loaded_model_is_had_at_once_unless_another_one_has_waited_too_long(
        fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "PATIENCE", 1000.0)

    async def scenario() -> None:
        shelf = new_shelf(max_loaded=1)
        assert shelf.take_loaded("a") is None
        with pytest.raises(ApiError, match="'c' does not exist"):
            shelf.take_loaded("c")
        await used(shelf, "a")
        assert shelf.take_loaded("a") is fake.made[0]
        assert shelf.entries["a"].users == 1
        other = asyncio.create_task(used(shelf, "b"))
        await asyncio.sleep(0.02)
        assert shelf.take_loaded("a") is fake.made[0]
        shelf.give_back("a")
        monkeypatch.setattr(shelf_module, "PATIENCE", 0.0)
        await asyncio.sleep(0.02)
        assert shelf.take_loaded("a") is None
        shelf.give_back("a")
        await other
        assert fake.made[0].closed
        fake.made[1].broken = True
        assert shelf.take_loaded("b") is None
        await shelf.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_model_that_waits_for_room_gets_it_though_another_one_is_always_in_use(
        fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "PATIENCE", 0.05)

    async def scenario() -> None:
        shelf = new_shelf(max_loaded=1)
        served = {"a": 0, "b": 0}

        async def client(name: str, delay: float) -> None:
            await asyncio.sleep(delay)
            while not all(served.values()):
                await used(shelf, name, 0.03)
                served[name] += 1

        await asyncio.gather(*(client("a", 0.01 * index) for index in range(3)), client("b", 0.05))
        await shelf.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_room_is_given_in_the_order_in_which_it_is_asked_for(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
                                                             ) -> None:
    sizes = {"a": 3 * SIZE, "large": 4 * SIZE, "small": SIZE}
    monkeypatch.setattr(Shelf, "_size", lambda _, request: sizes[request.model])
    order: list[str] = []

    async def scenario() -> None:
        shelf = new_shelf(memory_limit=4)
        for name in sizes:
            shelf.add(name, ModelRequest(model=name))

        async def ask(name: str) -> None:
            async with shelf.use(name):
                order.append(name)

        async with shelf.use("a"):
            FakeEngine.made[0].opened.weight_bytes = shelf.entries["a"].bytes = 3 * SIZE
            waiting = [asyncio.create_task(ask("large"))]
            await asyncio.sleep(0.05)
            waiting.append(asyncio.create_task(ask("small")))  # which would fit beside "a"
            await asyncio.sleep(0.05)
        await asyncio.gather(*waiting)
        assert order == ["large", "small"]
        await shelf.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_an_error_of_loading_that_nobody_waits_for_is_not_reported_as_lost(fake: type[FakeEngine]) -> None:
    async def scenario() -> list[dict[str, Any]]:
        lost: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        shelf = new_shelf()
        fake.gate.clear()
        fake.error = RuntimeError("no memory")
        first = asyncio.create_task(used(shelf, "a"))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.01)
        fake.gate.set()
        await asyncio.sleep(0.05)
        del first
        gc.collect()
        await asyncio.sleep(0)
        return lost

    assert not asyncio.run(asyncio.wait_for(scenario(), 60))
