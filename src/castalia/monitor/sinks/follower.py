"""Delivers the steps of metrics.jsonl to one sink, in a thread that the run never waits for.

The file is the queue: it is on the disk, it is whole, and it takes no memory however far a sink
falls behind. What a sink was given stands in monitors/NAME.json.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.monitor.sinks.along import Along
from castalia.monitor.sinks.jsonl import FILE
from castalia.monitor.sinks.record import FOLDER, Record
from castalia.monitor.sinks.sink import Sink, flatten, flatten_metrics
from castalia.monitor.sinks.tail import Tail

Tell = Callable[[str], None]
"""Called with a sentence for the user."""

FLUSHED_EVERY = 1.0
"""Seconds between two records of what was delivered: each costs a file."""
BACKOFF = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds before each new attempt after a failure; the last one for all that follow."""
ATTEMPTS_AT_END = 3
"""Failures in a row after which the end of a run does not wait any longer."""
SILENCE = 60.0
"""Seconds of one call after which the user is told that a sink hangs."""
IDENTITIES = ("rows_hash",)
"""Numbers that name something and are no quantity: a chart of them shows nothing."""


class Follower(Sink):
    """Stands for a sink among the sinks of a run; its calls return at once, but for `close`."""

    def __init__(self, sink: Sink, name: str, tell: Tell) -> None:
        """`name` is that of the record; `tell` gets warnings and good news, from any thread."""
        super().__init__(sink.config, sink.folder)
        self.sink = sink
        self.name = name
        self.tell = tell
        self.tail = Tail(sink.folder / FILE)
        self.record = Record(sink.folder / FOLDER / f"{name}.json")
        self.along = Along(sink, self.record)
        self.thread: threading.Thread | None = None
        self.wake = threading.Event()
        self.lock = threading.Lock()
        # Set by the run, read by the thread.
        self.rolled_back: int | None = None
        self.amended: tuple[int, dict[str, Any]] | None = None
        self.ending = threading.Event()
        self.ended = 0.0
        self.is_abandoned = False
        # Of the thread alone.
        self.is_started = False
        self.last_line: dict[str, Any] = {}
        self.flushed = 0.0
        self.kept_step = -1
        self.flush_failed = False
        # Set by the thread, read by the run.
        self.busy_since: float | None = None
        self.failures = 0
        self.reason = ""
        self.is_done = False
        self.told_silence = False

    def start(self, step: int) -> None:
        """Begin the thread; `step` is the last one that will not run again.

        Raises  ConfigError if the library of the sink is missing.
        """
        try:
            self.record.load()
        except DataError as error:
            self.tell(f"monitor {self.name}: {error}; it begins anew, with all steps of the run")
        if self.sink.library is not None:
            self.sink.library.load(f"monitor {self.name}")
        self.sink.kept = self.record.kept
        self.sink.about = self.about
        with self.lock:
            self.rolled_back = step
        self.ending.clear()
        self.is_done = False
        # A daemon: a call that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self.run, name=f"monitor-{self.name}", daemon=True)
        self.thread.start()

    def take(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Wake the thread: the step stands in metrics.jsonl."""
        self.wake.set()
        self.watch()

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Have the metrics added, if the step was delivered without them."""
        with self.lock:
            self.amended = (step, dict(metrics))
        self.wake.set()

    def restart(self, step: int) -> None:
        """Continue after `step`; metrics.jsonl has dropped those behind it."""
        with self.lock:
            # An earlier one that the thread has not come to yet may reach further back.
            earlier = self.rolled_back
            self.rolled_back = step if earlier is None else min(step, earlier)
        self.wake.set()

    def end(self) -> None:
        """Let the thread end when everything is delivered."""
        self.ended = time.monotonic()
        self.ending.set()
        self.wake.set()

    def close(self) -> None:
        """Wait for the thread, no longer than the patience of the config allows."""
        if self.thread is None:
            return
        if not self.ending.is_set():
            self.end()
        left = self.ended + self.config.patience - time.monotonic()
        self.thread.join(max(0.0, left))
        if not self.is_done:
            # Should its call return one day: the next start of the run may be at work by then.
            self.is_abandoned = True
            self.sink.abandon()
            self.tell(self.shortfall())
        self.thread = None

    def shortfall(self) -> str:
        """The sentence on what the sink did not get."""
        # From the file: the numbers of steps may begin anywhere.
        missing = sum(1 for _ in Tail(self.tail.path).after(self.record.delivered))
        steps = "1 step was" if missing == 1 else f"{missing} steps were"
        if not missing:
            steps = "the end of the run was"
        why = self.reason or f"no answer within patience={self.config.patience:g} s"
        return (
            f"monitor {self.name}: {steps} not delivered ({why}); metrics.jsonl has them, and the"
            " same command delivers them"
        )

    def watch(self) -> None:
        """Say once that the sink hangs."""
        since = self.busy_since
        if since is None or self.told_silence or time.monotonic() - since < SILENCE:
            return
        self.told_silence = True
        self.tell(
            f"monitor {self.name} does not answer; the run goes on, and what is written to"
            " metrics.jsonl is delivered when it does"
        )

    # What follows runs in the thread.

    def run(self) -> None:
        """Deliver until the run ends; after a failure wait and go on where it stopped."""
        at_end = 0
        while True:
            try:
                self.work()
                return
            # Any error of a foreign library: nothing of it may reach the run.
            except Exception as error:
                self.failed(error)
            finally:
                self.busy_since = None
            if self.is_abandoned:
                return
            if self.ending.is_set():
                at_end += 1
                # An error of the config does not go away by itself.
                if at_end >= ATTEMPTS_AT_END or self.reason.startswith(ConfigError.__name__):
                    return
            self.pause(BACKOFF[min(self.failures, len(BACKOFF)) - 1])

    def work(self) -> None:
        """Deliver what stands in the file, until the run ends."""
        while True:
            # Before the file is read: what is written meanwhile is read at the next turn.
            is_ending = self.ending.is_set()
            self.wake.clear()
            self.busy_since = time.monotonic()
            if not self.is_started:
                self.begin()
            self.roll_back()
            for record in self.tail.after(self.record.delivered):
                self.deliver(record)
                if self.is_abandoned:
                    return
            self.add_amended()
            if is_ending:
                self.finish()
                return
            late = self.flush_if_due()
            self.busy_since = None
            self.wake.wait(late)

    def begin(self) -> None:
        """Start the sink behind the last step that it has."""
        with self.lock:
            step = self.rolled_back
        delivered = self.record.delivered
        if self.sink.rewinds and step is not None:
            delivered = min(delivered, step)
            self.record.tables = min(self.record.tables, step)
        self.sink.start(delivered)
        known = self.sink.last_step()
        if known is not None:
            delivered = known
            # The tables of a step come with its numbers.
            self.record.tables = known
        self.record.delivered = delivered
        self.record.save()
        self.is_started = True
        self.settle(step)

    def roll_back(self) -> None:
        """Take back the steps that run again, where the sink can."""
        with self.lock:
            step = self.rolled_back
        if step is None:
            return
        self.tail.rewind()
        if self.sink.rewinds and self.record.delivered > step:
            self.sink.restart(step)
            self.record.delivered = step
            self.record.tables = min(self.record.tables, step)
            self.kept_step = min(self.kept_step, step)
        self.settle(step)

    def settle(self, step: int | None) -> None:
        """Forget a rollback that the sink has followed: not before, since the sink may fail."""
        with self.lock:
            if self.rolled_back == step:
                self.rolled_back = None

    def deliver(self, record: dict[str, Any]) -> None:
        """Hand one step to the sink."""
        step = record.pop("step")
        self.busy_since = time.monotonic()
        self.along.send_samples(step)
        metrics = {name: value for name, value in record.items() if name not in IDENTITIES}
        self.sink.take(step, metrics)
        self.record.delivered = step
        self.last_line = metrics
        # A service that fails to flush takes every step, and would recover with each of them.
        if self.failures and not self.flush_failed:
            self.recovered(step)
        self.flush_if_due()

    def add_amended(self) -> None:
        """Add numbers to the last step, if its line was delivered without them."""
        with self.lock:
            amended = self.amended
        if amended is None:
            return
        step, metrics = amended
        missing = flatten(metrics).keys() - flatten(self.last_line).keys()
        flat = {name: value for name, value in flatten_metrics(metrics).items() if name in missing}
        if flat and step == self.record.delivered:
            self.sink.amend(step, metrics if self.sink.nested else flat)
        # Not before: the sink may fail, and is asked again.
        with self.lock:
            if self.amended is amended:
                self.amended = None

    def flush_if_due(self) -> float | None:
        """Keep what was delivered, once a second; seconds until that is due, None if it is not."""
        if self.is_abandoned or (self.flushed and self.record.delivered == self.kept_step):
            return None
        left = self.flushed + FLUSHED_EVERY - time.monotonic()
        if left > 0:
            return left
        self.flush_failed = True
        is_kept = self.sink.flush()
        self.flush_failed = False
        if self.failures:
            self.recovered(self.record.delivered)
        if is_kept:
            self.record.save()
        self.kept_step = self.record.delivered
        self.flushed = time.monotonic()
        return None

    def finish(self) -> None:
        """Hand over the files of the run and close the sink."""
        self.along.send_samples(self.record.delivered)
        self.along.send_files()
        self.sink.close()
        self.tail.close()
        if self.is_abandoned:
            return
        self.record.save()
        self.is_started = False
        self.is_done = True

    def failed(self, error: Exception) -> None:
        """Note a failure; the first one in a row is told."""
        self.failures += 1
        # What was taken since the last flush may be lost with the queue of the sink.
        if self.sink.rewinds and 0 <= self.kept_step < self.record.delivered:
            self.restart(self.kept_step)
        text = " ".join(str(error).split())
        kind = type(error).__name__
        self.reason = f"{kind}: {text}" if text else kind
        if isinstance(error, CastaliaError) and not isinstance(error, ConfigError):
            self.reason = text
        if self.failures > 1 or self.ending.is_set():
            return
        self.tell(
            f"monitor {self.name}: {self.reason}; the run goes on without it and tries again,"
            " metrics.jsonl has every step"
        )

    def recovered(self, step: int) -> None:
        """Say once that the sink works again."""
        self.failures = 0
        self.reason = ""
        self.tell(f"monitor {self.name} works again, and takes the steps from {step} on")

    def pause(self, seconds: float) -> None:
        """Wait before the next attempt; the end of the run makes it soon."""
        if self.ending.is_set():
            # Long enough for a service that restarts, short enough for who waits.
            time.sleep(BACKOFF[0])
        else:
            self.ending.wait(seconds)
