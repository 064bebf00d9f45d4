"""The models in memory: loaded one after the other, dropped when idle, never more than `keep`.

A thread of its own loads them, so that no other request waits. In the turn of a name it

1. checks the files, because a damaged model must cost the others nothing;
2. chooses the model that makes room and lets it finish its texts, while new requests for it wait
   for their own turn;
3. loads, and only then drops the model that made room. If loading fails, that one goes on.

So there are `keep` models, those that still finish texts among them, and one more only while it is
being loaded. Where memory does not suffice for that one, steps 2 and 3 change places.
"""

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace

from castalia.core.errors import CastaliaError
from castalia.core.memory import return_freed_memory
from castalia.corpus.chat_template import ChatTemplate
from castalia.inference.language_model import LanguageModel
from castalia.serve.scheduler import Scheduler, StoppingError

POLL_SECONDS = 0.02
"""Between two looks at the texts of a model that is to go: their ends tell nobody."""
COLLECT_SECONDS = 1.0
"""Between two collections of cycles while a model is waited for."""
LOG = logging.getLogger("castalia.serve")


@dataclass(eq=False)
class LoadedModel:
    """A model in memory, with the scheduler whose thread owns it."""

    name: str
    model: LanguageModel
    scheduler: Scheduler
    template: ChatTemplate | None
    """The tokenizer's chat template; None for a base model."""
    stays: bool = False
    """Whether it never makes room: an adapter, and the base whose weights it shares."""
    users: "weakref.WeakSet[LoadedModel]" = field(default_factory=weakref.WeakSet)
    """Copies of this, one for each request; a copy lives as long as its request."""

    def for_request(self) -> "LoadedModel":
        """A copy, which keeps the model in memory."""
        copy = replace(self)
        self.users.add(copy)
        return copy

    @property
    def is_idle(self) -> bool:
        """Whether no request needs it."""
        return not self.users and self.scheduler.is_idle


class LoadingError(CastaliaError):
    """A model could not be loaded. The reason is in the log: it names paths of the server."""


class ModelBusyError(Exception):
    """Other models are still writing texts; retry after `seconds`."""

    def __init__(self, name: str, seconds: int) -> None:
        super().__init__(
            f"model {name!r} is not in memory, and the models there are busy; retry after"
            f" {seconds} s"
        )
        self.seconds = seconds


@dataclass(frozen=True)
class ModelSource:
    """What the thread needs to know of a name."""

    load: Callable[[str], LoadedModel]
    check: Callable[[str], None]
    """Raises what loading would, if it can be known from the files."""
    needs_room: Callable[[str], bool]
    """False for an adapter that shares weights in memory."""
    fits: Callable[[str, LoadedModel], bool]
    """Whether memory suffices for this model beside those that are there, the given one among
    them."""


@dataclass(eq=False)
class PendingModel:
    """A model that requests wait for."""

    name: str
    future: Future[LoadedModel] = field(default_factory=Future)
    waiters: int = 0
    is_read: bool = False
    """Whether its files are being read: then its requests wait for the end of that."""
    is_logged: bool = False


class LoadedModels:
    """At most `keep` models by name, and the requests that wait for others."""

    def __init__(self, source: ModelSource, keep: int, wait: float) -> None:
        """`wait` are the seconds for which a request waits for room."""
        self.source = source
        self.keep = keep
        self.wait = wait
        self.ready: OrderedDict[str, LoadedModel] = OrderedDict()
        """Least recently used first."""
        self.going: list[LoadedModel] = []
        """Ready models that make room for the one whose turn it is."""
        self.dropped: list[tuple[str, weakref.ref[object]]] = []
        """Engines of models that were dropped; an answer that is being written may hold one."""
        self.pending: OrderedDict[str, PendingModel] = OrderedDict()
        """In the order of their turns."""
        self.collected = 0.0
        """When cycles were last collected, as time.monotonic()."""
        self.changed = threading.Condition()
        self.stopping = False
        self.thread = threading.Thread(target=self.work, name="castalia-loader", daemon=True)
        self.thread.start()

    def find(self, name: str) -> LoadedModel | None:
        """A model that takes requests now, for one of them; None if its turn must come first."""
        with self.changed:
            loaded = self.ready.get(name)
            if loaded is None or loaded in self.going:
                return None
            self.ready.move_to_end(name)
            return loaded.for_request()

    async def get(self, name: str) -> LoadedModel:
        """A model; waits for its turn.

        Raises  ModelBusyError if no model makes room in time; LoadingError; StoppingError.
        """
        loaded = self.find(name)
        if loaded is not None:
            return loaded
        pending = self.request(name)
        done = event_of(pending.future)
        try:
            while not done.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), self.wait)
                if not (done.is_set() or pending.is_read):
                    raise ModelBusyError(name, self.seconds())
            return self.result(pending)
        finally:
            self.leave(pending)

    def get_now(self, name: str) -> LoadedModel:
        """A model, for callers without an event loop.

        Raises  the error of loading itself; StoppingError.
        """
        loaded = self.ready.get(name)
        if loaded is not None:
            return loaded
        pending = self.request(name)
        pending.is_logged = True
        try:
            loaded = pending.future.result()
            return self.ready.get(name, loaded)
        finally:
            self.leave(pending)

    def request(self, name: str) -> PendingModel:
        """Wait in line for a model; requests for one name share its turn."""
        with self.changed:
            self.require_running()
            pending = self.pending.setdefault(name, PendingModel(name))
            pending.waiters += 1
            self.changed.notify_all()
            return pending

    def leave(self, pending: PendingModel) -> None:
        """A request no longer waits; without any the model is not loaded."""
        with self.changed:
            pending.waiters -= 1
            is_first = next(iter(self.pending.values()), None) is pending
            # The thread itself notices that of the one whose turn it is.
            if not pending.waiters and not is_first:
                self.pending.pop(pending.name, None)
            self.changed.notify_all()

    def result(self, pending: PendingModel) -> LoadedModel:
        """What came of a turn.

        Raises  LoadingError, whose reason goes to the log once; StoppingError.
        """
        error = pending.future.exception()
        if error is None:
            return pending.future.result().for_request()
        if isinstance(error, StoppingError):
            raise error
        if not pending.is_logged:
            pending.is_logged = True
            trace = None if isinstance(error, CastaliaError) else error
            LOG.error("model %s could not be loaded: %s", pending.name, error, exc_info=trace)
        raise LoadingError(
            f"model {pending.name!r} could not be loaded; the log of the server has the reason"
        ) from error

    def seconds(self) -> int:
        """Seconds after which a retry may find room: those of a text."""
        with self.changed:
            models = self.going or list(self.ready.values())
            average = max((one.scheduler.seconds_per_text for one in models), default=1.0)
        return max(1, round(average))

    def work(self) -> None:
        """The thread's loop: one turn after the other."""
        while True:
            pending = self.next()
            if pending is None:
                return
            loaded = None
            try:
                loaded = self.take_turn(pending)
            except BaseException as error:
                self.end_turn(pending, over=True)
                pending.future.set_exception(error)
            else:
                self.end_turn(pending, over=loaded is not None)
                if loaded is not None:
                    pending.future.set_result(loaded)
            # Between turns nothing here may hold a model that the next one drops.
            del loaded
            del pending

    def next(self) -> PendingModel | None:
        """Whose turn it is; None once stopped. Meanwhile memory of dropped models is returned."""
        while True:
            with self.changed:
                if self.stopping:
                    break
                if self.pending:
                    return next(iter(self.pending.values()))
                self.changed.wait(POLL_SECONDS if self.dropped else None)
            self.release()
        for pending in self.pending.values():
            pending.future.set_exception(StoppingError("the server is shutting down"))
        return None

    def take_turn(self, pending: PendingModel) -> LoadedModel | None:
        """Load a model as the module says; None if nobody waits for it any more."""
        name = pending.name
        loaded = self.find(name)
        if loaded is not None:
            return loaded
        pending.is_read = True
        self.source.check(name)
        if not self.source.needs_room(name):
            return self.publish(name, self.source.load(name))
        pending.is_read = False
        if not self.make_room(pending):
            return None
        if self.going and not self.source.fits(name, self.going[-1]):
            self.drop()
            if not self.wait_for(pending, lambda: not self.dropped):
                return None
        pending.is_read = True
        loaded = self.source.load(name)
        self.drop()
        return self.publish(name, loaded)

    def make_room(self, pending: PendingModel) -> bool:
        """Hold the models that are to go as soon as they are idle; False if nobody waits so long.

        Idle models go first, then the least recently used.
        """
        with self.changed:
            models = [one for one in self.ready.values() if not one.stays]
            models.sort(key=lambda one: not one.is_idle)
            self.going = models[: max(0, len(models) - self.keep + 1)]
        # A model that was dropped counts until its memory is free.
        return self.wait_for(
            pending, lambda: not self.dropped and all(one.is_idle for one in self.going)
        )

    def wait_for(self, pending: PendingModel, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False if nobody waits for the model any more.

        Raises  StoppingError.
        """
        # Most waits end before a collection would pay.
        self.collected = time.monotonic()
        while True:
            with self.changed:
                self.require_running()
                if not pending.waiters:
                    return False
            if condition():
                return True
            with self.changed:
                self.changed.wait(POLL_SECONDS)
            self.release()

    def require_running(self) -> None:
        """Raises  StoppingError if the server is shutting down."""
        if self.stopping:
            raise StoppingError("the server is shutting down; retry when it is back")

    def drop(self) -> None:
        """Drop the models that are held."""
        if not self.going:
            return
        self.collected = time.monotonic()
        with self.changed:
            for one in self.going:
                self.ready.pop(one.name)
                one.scheduler.close(wait=False)
                self.dropped.append((one.name, weakref.ref(one.model.engine)))
            self.going = []
        self.release()

    def release(self) -> None:
        """Return the memory of dropped models that nothing holds any more."""
        now = time.monotonic()
        if now - self.collected > COLLECT_SECONDS:
            # A request that failed may be held by its own traceback, and hold a model.
            self.collected = now
            gc.collect()
        with self.changed:
            held = [(name, engine) for name, engine in self.dropped if engine() is not None]
            is_freed = len(held) < len(self.dropped)
            self.dropped = held
        # Not under the lock: it takes milliseconds, in which no request would find its model.
        if is_freed:
            # Keys and values are a part of a cycle.
            gc.collect()
            return_freed_memory()

    def publish(self, name: str, loaded: LoadedModel) -> LoadedModel:
        """A model takes requests from here on, that of this turn first."""
        with self.changed:
            self.ready[name] = loaded
            if self.stopping:
                loaded.scheduler.close(wait=False)
            self.require_running()
            return loaded.for_request()

    def end_turn(self, pending: PendingModel, *, over: bool) -> None:
        """Let those that did not have to go take requests again.

        A turn that nobody waited for is not `over` if somebody has begun to wait meanwhile.
        """
        with self.changed:
            self.going = []
            pending.is_read = False
            if over or not pending.waiters:
                self.pending.pop(pending.name, None)

    def loading(self) -> list[str]:
        """Names that requests wait for."""
        with self.changed:
            return list(self.pending)

    def leaving(self) -> list[str]:
        """Names of models that finish their texts or answers and then make room."""
        with self.changed:
            return [one.name for one in self.going] + [name for name, _ in self.dropped]

    def close(self) -> None:
        """Load no more; the texts of those that are ready finish."""
        with self.changed:
            self.stopping = True
            for loaded in self.ready.values():
                loaded.scheduler.close(wait=False)
            self.changed.notify_all()


def event_of(future: Future[LoadedModel]) -> asyncio.Event:
    """An event of the running loop that is set when another thread ends a future."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def tell(future: Future[LoadedModel]) -> None:
        # The loop is closed if the server is down, and then nobody waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(tell)
    return done
