"""Which models are in memory, and which requests wait for others."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from castalia.core.errors import CheckpointError
from castalia.serve.loaded_models import (
    LoadedModel,
    LoadedModels,
    LoadingError,
    ModelBusyError,
    ModelSource,
)
from castalia.serve.scheduler import StoppingError


class FakeEngine:
    """The weights."""

    alive: "weakref.WeakSet[FakeEngine]" = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)


@dataclass
class FakeScheduler:
    """A scheduler whose texts the test begins and ends."""

    is_idle: bool = True
    closed: bool = False
    seconds_per_text: float = 3.2

    def close(self, wait: bool) -> None:
        self.closed = True


@dataclass
class FakeModels:
    """Loads of the test, with their order and the most models at a time."""

    loads: list[str] = field(default_factory=list)
    most: int = 0
    damaged: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    fits: bool = True
    gate: threading.Event = field(default_factory=threading.Event)

    def load(self, name: str) -> LoadedModel:
        self.loads.append(name)
        assert self.gate.wait(120)
        if name in self.broken:
            raise RuntimeError("a kernel failed")
        model: Any = SimpleNamespace(engine=FakeEngine())
        self.most = max(self.most, len(FakeEngine.alive))
        scheduler: Any = FakeScheduler()
        return LoadedModel(name, model, scheduler, None)

    def check(self, name: str) -> None:
        if name in self.damaged:
            raise CheckpointError(f"/secret/{name} is damaged")


@pytest.fixture
def fake() -> FakeModels:
    """What loads; the gate is open."""
    models = FakeModels()
    models.gate.set()
    gc.collect()
    assert not FakeEngine.alive
    return models


@pytest.fixture
def start(fake: FakeModels) -> Iterator[Callable[..., LoadedModels]]:
    """Callable: models that are kept, by number and seconds of waiting."""
    made = []

    def make(keep: int = 1, wait: float = 60.0) -> LoadedModels:
        source = ModelSource(
            load=fake.load,
            check=fake.check,
            needs_room=lambda name: True,
            fits=lambda name, other: fake.fits,
        )
        made.append(LoadedModels(source, keep, wait))
        return made[-1]

    yield make
    for models in made:
        models.close()
        models.thread.join(120)
        assert not models.thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, two minutes at most: the machine may be busy."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


async def until_also(condition: Callable[[], bool]) -> None:
    """As `until`, while other tasks go on."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


def test_requests_of_one_model_load_it_once(
    fake: FakeModels, start: Callable[..., LoadedModels]
) -> None:
    models = start()

    async def ask() -> list[LoadedModel]:
        fake.gate.clear()
        waiting = [asyncio.create_task(models.get("a")) for _ in range(20)]
        await until_also(lambda: models.loading() == ["a"])
        fake.gate.set()
        return await asyncio.gather(*waiting)

    found = asyncio.run(ask())
    assert fake.loads == ["a"] and len({id(one.model) for one in found}) == 1
    assert not models.loading()


def test_more_models_than_kept_take_turns(
    fake: FakeModels, start: Callable[..., LoadedModels]
) -> None:
    """Twelve requests of as many models; each needs its model for a while."""
    models = start(keep=2, wait=120.0)

    async def ask(name: str) -> str:
        loaded = await models.get(name)
        await asyncio.sleep(0.02)
        return loaded.name

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(ask(f"step{n}") for n in range(12)))

    assert asyncio.run(all_of_them()) == [f"step{n}" for n in range(12)]
    assert sorted(fake.loads) == sorted(f"step{n}" for n in range(12))
    # Those that are kept, and the one that was being loaded.
    assert fake.most <= 3
    until(lambda: not models.leaving())
    assert len(FakeEngine.alive) == 2 and len(models.ready) == 2


def test_a_busy_model_is_waited_for_so_long(
    fake: FakeModels, start: Callable[..., LoadedModels]
) -> None:
    models = start(wait=0.2)
    first = models.get_now("a")
    first.scheduler.is_idle = False  # type: ignore[misc]
    with pytest.raises(ModelBusyError, match=r"'b' is not in memory.* retry after 3 s") as caught:
        asyncio.run(models.get("b"))
    assert caught.value.seconds == 3
    # Nobody waits any more, so the busy one takes requests again.
    until(lambda: not models.leaving())
    assert asyncio.run(models.get("a")).model is first.model and fake.loads == ["a"]
    models.wait = 120.0

    async def ask() -> str:
        waiting = asyncio.create_task(models.get("b"))
        await until_also(lambda: models.leaving() == ["a"])
        assert models.find("a") is None
        assert not first.scheduler.closed  # type: ignore[attr-defined]
        first.scheduler.is_idle = True  # type: ignore[misc]
        return (await waiting).name

    assert asyncio.run(ask()) == "b" and first.scheduler.closed  # type: ignore[attr-defined]


def test_a_request_keeps_its_model(fake: FakeModels, start: Callable[..., LoadedModels]) -> None:
    """Also before its texts are queued and after they ended."""
    models = start(wait=0.2)

    async def ask() -> None:
        held = await models.get("a")
        with pytest.raises(ModelBusyError):
            await models.get("b")
        del held
        models.wait = 120.0
        assert (await models.get("b")).name == "b"

    asyncio.run(ask())


@pytest.mark.parametrize("fits", [True, False])
def test_a_damaged_model_costs_the_others_nothing(
    fake: FakeModels,
    start: Callable[..., LoadedModels],
    caplog: pytest.LogCaptureFixture,
    fits: bool,
) -> None:
    fake.damaged = ("bad",)
    fake.broken = ("worse",)
    models = start()
    first = models.get_now("a")
    with pytest.raises(LoadingError, match="'bad' could not be loaded; the log") as caught:
        asyncio.run(models.get("bad"))
    assert "secret" not in str(caught.value) and "/secret/bad is damaged" in caplog.text
    assert list(models.ready) == ["a"] and fake.loads == ["a"]
    with pytest.raises(LoadingError, match="'worse' could not be loaded"):
        asyncio.run(models.get("worse"))
    assert "a kernel failed" in caplog.text
    assert asyncio.run(models.get("a")).model is first.model and not models.leaving()
    assert fake.loads == ["a", "worse"]


def test_without_memory_for_two_one_goes_first(
    fake: FakeModels, start: Callable[..., LoadedModels]
) -> None:
    fake.fits = False
    models = start()
    for name in ("a", "b", "c"):
        models.get_now(name)
    assert fake.most == 1 and list(models.ready) == ["c"]


def test_a_stop_ends_the_waiting(fake: FakeModels, start: Callable[..., LoadedModels]) -> None:
    models = start()
    models.get_now("a").scheduler.is_idle = False  # type: ignore[misc]

    async def ask() -> None:
        waiting = asyncio.create_task(models.get("b"))
        await until_also(lambda: models.leaving() == ["a"])
        models.close()
        with pytest.raises(StoppingError):
            await waiting
        with pytest.raises(StoppingError):
            await models.get("c")

    asyncio.run(ask())
