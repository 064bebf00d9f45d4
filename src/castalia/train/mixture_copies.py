"""Mending the mixture record of a run from the copies of its newest lines in the checkpoints."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from castalia.checkpoint import complete_steps
from castalia.checkpoint.load import read_text
from castalia.checkpoint.names import step_name
from castalia.core.errors import CheckpointError
from castalia.core.files import atomic_write
from castalia.core.log_lines import Links, step_of, text_of, whole_lines

HEADER = 0
"""The header in place of a step: it stands before all of them."""


def mend(path: Path, step: int, least: int | None, checkpoints: Path) -> str | None:
    """Check the record at `path` up to `step`, and restore what is wrong in it.

    least        the last step that it must have a line of; None if that is not known.
    checkpoints  folder of the run's checkpoints, those up to `step` with copies.
    Returns      what was wrong and what became of it, or None. A record that cannot be restored is
                 renamed, so that nobody takes it for a whole one.
    Raises       CastaliaError if the folder cannot be written.
    """
    present = list(raw_lines(path))
    aside = path.with_name(f"mixture-damaged-to-step-{step:08d}.jsonl")
    if aside.exists():
        # Begun anew at this very step, by a start that was killed before it wrote more.
        least = None
    fault = fault_of(lines_until(present, step), least)
    if fault is None:
        return None
    copied: list[bytes] = []
    for saved in complete_steps(checkpoints):
        if saved <= step:
            copied += copy_in(checkpoints / step_name(saved), path.name)
    # Either may hold lines that the other lacks; the checksums decide whether they fit together.
    for sources in ((present, copied), (copied, present)):
        whole = joined(sources, step)
        if fault_of(whole, least) is None:
            with atomic_write(path, "wb") as file:
                file.writelines(line + b"\n" for line in whole)
            return f"{path} is damaged: {fault}; restored from the copies in {checkpoints}"
    words = "a new record begins here, and a replay has no steps before it"
    if path.exists():
        path.rename(aside)
        words = f"it is {aside.name} now, {words}"
    return (
        f"{path} is damaged: {fault}; the copies in {checkpoints} do not have all that it lacks:"
        f" {words}"
    )


def raw_lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, without their line breaks; none if it is gone."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (raw.removesuffix(b"\n") for raw in whole_lines(file))


def place_of(raw: bytes) -> int | None:
    """The step of a line, HEADER for a header; None if it was changed or is neither."""
    text = text_of(raw)
    if text is None:
        return None
    step = step_of(text)
    if step is None and text.startswith(b'{"format"'):
        return HEADER
    return step


def lines_until(lines: Iterable[bytes], step: int) -> list[bytes]:
    """The lines before the first one behind `step`: those behind it will be written again."""
    kept: list[bytes] = []
    for raw in lines:
        place = place_of(raw)
        if place is not None and place > step:
            break
        kept.append(raw)
        if place == step:
            break
    return kept


def fault_of(lines: Iterable[bytes], least: int | None) -> str | None:
    """What is wrong with the lines of a record, or None."""
    links = Links()
    last = HEADER
    for raw in lines:
        line = links.take(raw)
        place = place_of(raw)
        if line.fault:
            return f"line {line.number}, behind step {last}: {line.fault}"
        if place is None:
            return f"line {line.number} is not a line of a mixture record"
        last = place
    if least is not None and last < least:
        return f"it ends with step {last}, though a checkpoint relies on it up to step {least}"
    return None


def joined(sources: Iterable[Iterable[bytes]], step: int) -> list[bytes]:
    """The lines up to `step` in order; of two of one step, that of the first source that has it."""
    by_place: dict[int, bytes] = {}
    for lines in sources:
        for raw in lines:
            place = place_of(raw)
            if place is not None and place <= step:
                by_place.setdefault(place, raw)
    return [by_place[place] for place in sorted(by_place)]


def copy_in(checkpoint: Path, name: str) -> list[bytes]:
    """The lines that a checkpoint has a copy of; none where it has none, or is damaged."""
    try:
        return read_text(checkpoint, name).encode().split(b"\n")[:-1]
    except CheckpointError:
        return []
