"""Listeners are told of each part of a step, in order and nested; without one nothing is done."""

from contextlib import contextmanager

from castalia.monitor import parts
from castalia.monitor.parts import listen, part, unlisten


def test_listeners_are_entered_and_left_in_order():
    told = []

    def listener(who):
        @contextmanager
        def around(name):
            told.append(f"{who} +{name}")
            yield
            told.append(f"{who} -{name}")

        return around

    first = listener("a")
    second = listener("b")
    listen(first)
    listen(second)
    with part("forward"):
        unlisten(second)
        with part("loss"):
            pass
    unlisten(first)
    expected = "a +forward, b +forward, a +loss, a -loss, b -forward, a -forward"
    assert told == expected.split(", ")
    assert part("forward") is parts.OFF
