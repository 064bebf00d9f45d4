"""Sinks in the background: one that blocks, one that fails, one that recovers; nothing is lost."""

import json
import threading
import time
from typing import Literal

import pytest

from castalia.core.errors import ConfigError
from castalia.integrity.logs import check_files
from castalia.monitor.sinks import (
    SINKS,
    About,
    Sink,
    SinkConfig,
    close_sinks,
    follower,
    make_sinks,
)
from castalia.monitor.sinks.sink import Library


class Tried(Sink):
    """Notes what it is given; a test says what happens before."""

    class Config(SinkConfig):
        """Its own kind."""

        kind: Literal["tried"] = "tried"

    steps: list
    tables: list
    before: staticmethod
    restarting: staticmethod
    flushing: staticmethod

    def start(self, step):
        self.kept.setdefault("id", "first")
        self.starts.append(step)

    def write(self, step, metrics):
        type(self).before(step)
        self.steps.append((step, metrics))

    def table(self, name, step, rows):
        self.tables.append((name, step, rows))

    def flush(self):
        type(self).flushing()
        return True

    def restart(self, step):
        type(self).restarting(step)
        super().restart(step)

    def close(self):
        self.starts.append("closed")


@pytest.fixture
def tried(monkeypatch):
    """The sink `tried`, registered for one test."""
    for name in ("steps", "tables", "starts"):
        setattr(Tried, name, [])
    Tried.before = staticmethod(lambda step: None)
    Tried.restarting = staticmethod(lambda step: None)
    Tried.flushing = staticmethod(lambda: None)
    Tried.rewinds = False
    monkeypatch.setitem(SINKS.items, "tried", Tried)
    monkeypatch.setattr(follower, "BACKOFF", (0.01,))
    yield Tried
    # A thread that a test left behind would deliver to the lists of the next one.
    for thread in threading.enumerate():
        if thread.name.startswith("monitor-"):
            thread.join(30)


def sinks_of(folder, *, patience=5.0, tell=print):
    """The file and the sink `tried`."""
    return make_sinks([Tried.Config(patience=patience)], folder, About("run"), tell)


def write(sinks, *steps):
    """Steps as the hook writes them."""
    for step in steps:
        for sink in sinks:
            sink.take(step, {"loss": 1 / step, "sources": {"web": {"loss": step}}, "rows_hash": 7})


def start(sinks, step=0):
    """Open all of them."""
    for sink in sinks:
        sink.start(step)


def flat(*steps):
    """What a sink gets of `write`."""
    return [(step, {"loss": 1 / step, "sources/web/loss": step}) for step in steps]


def test_a_resume_goes_on_where_the_sink_is_and_fills_in_what_it_missed(tried, tmp_path):
    sinks = sinks_of(tmp_path)
    start(sinks)
    write(sinks, 1, 2, 3)
    close_sinks(sinks)
    assert tried.steps == flat(1, 2, 3) and tried.starts == [0, "closed"]
    record = json.loads((tmp_path / "monitors" / "tried.json").read_text())
    assert record["delivered"] == 3 and record["kept"] == {"id": "first"}
    # The checkpoint was that of step 2, and steps 4 and 5 were written without the sink.
    only_file = make_sinks([], tmp_path)
    start(only_file, 2)
    write(only_file, 3, 4, 5)
    close_sinks(only_file)
    sinks = sinks_of(tmp_path)
    start(sinks, 5)
    write(sinks, 6)
    close_sinks(sinks)
    assert tried.steps == flat(1, 2, 3, 4, 5, 6)
    assert tried.starts == [0, "closed", 3, "closed"]


@pytest.mark.parametrize("rewinds", [False, True])
def test_a_rollback_is_sent_again_only_where_steps_can_be_taken_back(tried, tmp_path, rewinds):
    tried.rewinds = rewinds
    sinks = sinks_of(tmp_path)
    start(sinks)
    write(sinks, 1, 2, 3, 4)
    wait_for(lambda: len(tried.steps) == 4)
    for sink in sinks:
        sink.restart(2)
    write(sinks, 3, 4, 5)
    close_sinks(sinks)
    again = (3, 4) if rewinds else ()
    assert tried.steps == flat(1, 2, 3, 4, *again, 5)


def test_of_two_rollbacks_the_further_one_counts_and_a_failure_is_tried_again(
    tried, tmp_path, monkeypatch
):
    monkeypatch.setattr(follower, "FLUSHED_EVERY", 0.0)
    tried.rewinds = True
    gate = threading.Event()
    failures = iter([True])

    def fail(step):
        if next(failures, False):
            raise OSError

    tried.before = staticmethod(lambda step: gate.wait() if step == 4 else None)
    tried.restarting = staticmethod(fail)
    sinks = sinks_of(tmp_path, tell=lambda text: None)
    start(sinks)
    write(sinks, 1, 2, 3, 4)
    # Both while the sink is busy: it is to take back steps 2 to 4.
    wait_for(lambda: len(tried.steps) == 3)
    for first, last in ((1, 4), (2, 4)):
        for sink in sinks:
            sink.restart(first)
        write(sinks, *range(first + 1, last + 1))
    gate.set()
    close_sinks(sinks)
    assert tried.steps == flat(1, 2, 3, 4, 2, 3, 4)
    assert tried.starts == [0, "closed", 1, "closed"]


def test_a_resume_takes_back_all_steps_behind_its_checkpoint(tried, tmp_path, monkeypatch):
    tried.rewinds = True
    sinks = sinks_of(tmp_path)
    start(sinks)
    write(sinks, 1, 2, 3, 4)
    close_sinks(sinks)
    sinks = sinks_of(tmp_path)
    # The thread begins when steps have been taken already.
    gate = threading.Event()
    run = sinks[1].run
    monkeypatch.setattr(sinks[1], "run", lambda: gate.wait() and run())
    start(sinks, 2)
    write(sinks, 3, 4)
    gate.set()
    close_sinks(sinks)
    assert tried.steps == flat(1, 2, 3, 4, 3, 4)


def test_what_was_not_flushed_before_a_failure_is_sent_again(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "FLUSHED_EVERY", 1000.0)
    tried.rewinds = True
    failures = iter([True])

    def fail(step):
        if step == 4 and next(failures, False):
            raise OSError

    tried.before = staticmethod(fail)
    sinks = sinks_of(tmp_path, tell=lambda text: None)
    start(sinks)
    write(sinks, 1)
    # The only flush: at the start, before the first step or behind it.
    wait_for(lambda: sinks[1].kept_step >= 0)
    again = range(sinks[1].kept_step + 1, 4)
    write(sinks, 2, 3, 4)
    close_sinks(sinks)
    assert tried.steps == flat(1, 2, 3, *again, 4)


def test_a_sink_that_cannot_flush_is_told_of_once(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "FLUSHED_EVERY", 0.0)
    broken = threading.Event()

    def flush():
        if broken.is_set():
            raise OSError("full")

    tried.flushing = staticmethod(flush)
    told = []
    sinks = sinks_of(tmp_path, tell=told.append)
    start(sinks)
    write(sinks, 1)
    wait_for(lambda: sinks[1].kept_step == 1)
    broken.set()
    for step in range(2, 6):
        write(sinks, step)
        wait_for(lambda step=step: sinks[1].record.delivered == step)
    assert len(told) == 1 and "OSError: full; the run goes on" in told[0]
    broken.clear()
    wait_for(lambda: len(told) == 2)
    assert told[1] == "monitor tried works again, and takes the steps from 5 on"
    close_sinks(sinks)
    assert tried.steps == flat(1, 2, 3, 4, 5)


def test_a_sink_that_blocks_for_ever_costs_its_patience_at_the_end_alone(tried, tmp_path):
    gate = threading.Event()
    tried.before = staticmethod(lambda step: gate.wait() if step == 2 else None)
    told = []
    sinks = sinks_of(tmp_path, patience=0.3, tell=told.append)
    start(sinks)
    # The gate stays closed: it would be waited for without end.
    write(sinks, *range(1, 500))
    began = time.monotonic()
    close_sinks(sinks)
    assert time.monotonic() - began > 0.2
    assert tried.steps == flat(1)
    assert told == [
        "monitor tried: 498 steps were not delivered (no answer within patience=0.3 s);"
        " metrics.jsonl has them, and the same command delivers them"
    ]
    gate.set()


def test_a_sink_that_hangs_is_told_of_while_the_run_goes_on(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "SILENCE", 0.05)
    gate = threading.Event()
    tried.before = staticmethod(lambda step: gate.wait())
    told = []
    sinks = sinks_of(tmp_path, tell=told.append)
    start(sinks)
    write(sinks, 1)
    wait_for(lambda: sinks[1].busy_since is not None)
    time.sleep(0.1)
    write(sinks, 2, 3)
    gate.set()
    close_sinks(sinks)
    assert len(told) == 1 and told[0].startswith("monitor tried does not answer; the run goes on")
    assert tried.steps == flat(1, 2, 3)


def test_a_sink_that_fails_each_time_is_one_warning_and_one_count(tried, tmp_path):
    def fail(step):
        raise OSError("no route\nto host")

    tried.before = staticmethod(fail)
    told = []
    sinks = sinks_of(tmp_path, tell=told.append)
    start(sinks)
    for step in range(1, 30):
        write(sinks, step)
        time.sleep(0.005)
    close_sinks(sinks)
    assert told == [
        "monitor tried: OSError: no route to host; the run goes on without it and tries again,"
        " metrics.jsonl has every step",
        "monitor tried: 29 steps were not delivered (OSError: no route to host); metrics.jsonl has"
        " them, and the same command delivers them",
    ]
    # The same command again: now it answers.
    tried.before = staticmethod(lambda step: None)
    sinks = sinks_of(tmp_path, tell=told.append)
    start(sinks, 29)
    close_sinks(sinks)
    assert tried.steps == flat(*range(1, 30)) and len(told) == 2


def test_a_sink_that_recovers_gets_every_step_once(tried, tmp_path):
    failures = iter([True] * 4)

    def fail(step):
        if step > 2 and next(failures, False):
            raise TimeoutError

    tried.before = staticmethod(fail)
    told = []
    sinks = sinks_of(tmp_path, tell=told.append)
    start(sinks)
    write(sinks, *range(1, 40))
    wait_for(lambda: len(tried.steps) == 39)
    close_sinks(sinks)
    assert tried.steps == flat(*range(1, 40))
    assert [text.split(";")[0] for text in told] == [
        "monitor tried: TimeoutError",
        "monitor tried works again, and takes the steps from 3 on",
    ]


def test_samples_come_before_the_numbers_of_their_step(tried, tmp_path):
    samples = [{"step": step, "prompt": "a", "text": f"b{step}"} for step in (2, 4)]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(samples))
    order = []
    tried.before = staticmethod(lambda step: order.append((step, len(tried.tables))))
    sinks = sinks_of(tmp_path)
    start(sinks)
    write(sinks, 1, 2, 3, 4)
    close_sinks(sinks)
    assert order == [(1, 0), (2, 1), (3, 1), (4, 2)]
    assert tried.tables == [("samples", row["step"], [row]) for row in samples]


def test_a_damaged_record_is_told_and_begins_anew(tried, tmp_path):
    sinks = sinks_of(tmp_path)
    start(sinks)
    write(sinks, 1)
    close_sinks(sinks)
    record = tmp_path / "monitors" / "tried.json"
    record.write_text(record.read_text().replace('"delivered": 1', '"delivered": 9'))
    faults = {file.path: file.fault for file in check_files(tmp_path)}
    assert "SHA-256 is not that of its content" in faults[str(record)]
    told = []
    sinks = sinks_of(tmp_path, tell=told.append)
    start(sinks, 1)
    close_sinks(sinks)
    assert "it begins anew, with all steps of the run" in told[0]
    assert tried.steps == flat(1, 1)
    assert all(file.fault is None for file in check_files(tmp_path))


def test_a_missing_library_is_one_sentence_before_the_run(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(Tried, "library", Library("no_such_module", "wandb"))
    with pytest.raises(ConfigError, match=r"monitor tried needs 'no_such_module'.*\[wandb\]"):
        make_sinks([Tried.Config()], tmp_path)


def wait_for(condition):
    """Until the thread has come so far; two minutes at most, for the machine may be busy."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
