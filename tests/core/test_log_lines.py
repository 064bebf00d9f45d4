"""Every change of a log shows: in the line that has it, or in the line behind it."""

import json

import pytest

from castalia.core.log_lines import (
    BROKEN,
    CHANGED,
    UNLINKED,
    LineLog,
    Links,
    read_log,
    text_of,
    write_log,
)


def faults(path):
    """The lines with a fault, by number."""
    return {line.number: line.fault for line in read_log(path) if line.fault}


@pytest.fixture
def log(tmp_path):
    """A log of six lines, and its lines."""
    path = tmp_path / "log.jsonl"
    written = LineLog(path)
    written.open()
    for step in range(1, 7):
        written.append(json.dumps({"step": step, "loss": 1 / step}), step)
    written.close()
    return path, path.read_bytes().splitlines(keepends=True)


def test_every_flipped_bit_shows(log):
    whole = b"".join(log[1][:3])
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        links = Links()
        found = [links.take(raw).fault for raw in data.split(b"\n")[:-1]]
        # Without its line break the last line is one that a crash cut off: the checkpoint counts.
        assert any(found) or len(found) < 3, bit


def test_lines_that_are_missing_doubled_or_moved(log):
    path, lines = log
    one, two, three, four, *_ = lines
    for changed, found in (
        ([two, three], {1: BROKEN}),
        ([one, three, four], {2: BROKEN}),
        ([one, two, two, three], {3: BROKEN}),
        ([one, three, two, four], {2: BROKEN, 3: BROKEN, 4: BROKEN}),
        ([one, b'{"step": 2}\n', three], {2: UNLINKED}),
        ([one, two.replace(b'"step": 2', b'"step": 3'), three], {2: CHANGED}),
    ):
        path.write_bytes(b"".join(changed))
        assert faults(path) == found
    # Each line for itself, wherever reading began.
    assert json.loads(text_of(three[:-1])) == {"step": 3, "loss": 1 / 3}
    assert text_of(three.replace(b"0.33", b"0.43")[:-1]) is None


def test_a_log_goes_on_behind_what_a_crash_left_and_behind_older_lines(log):
    path = log[0]
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    again = LineLog(path, copied=150)
    again.open()
    assert (again.lines, again.step) == (2, 2)
    for step in (3, 4, 5, 6):
        again.append(json.dumps({"step": step}), step)
    again.close()
    assert [json.loads(line.text)["step"] for line in read_log(path)] == [1, 2, 3, 4, 5, 6]
    assert [line.is_covered for line in read_log(path)] == [False] * 2 + [True] * 4
    # The newest whole lines, as many as fit.
    assert 1 < again.copy().count("\n") < 6
    assert path.read_text().endswith(again.copy())
    # The first line with a checksum vouches for those without one.
    path.write_bytes(path.read_bytes().replace(b'{"step": 1}', b'{"step": 7}'))
    assert faults(path) == {3: BROKEN}
    write_log(path, [line.text for line in read_log(path)])
    assert not faults(path)
