"""Extents grouped into parts, the units of work of a job."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from castalia.corpus.extents import WHOLE, Extent, OnInputBytes, Share, extents_of_all
from castalia.corpus.inputs import InputFile

PART_EXTENTS = 4096
"""Most extents in a part: bounds the message to a worker when inputs are many tiny files."""


@dataclass(frozen=True)
class JobPart:
    """Neighbouring extents that one worker encodes together."""

    number: int
    extents: tuple[Extent, ...]
    identity: str
    """Hash of everything that its files depend on; a finished part of equal identity is reused."""
    most_documents: int | None = None
    """Documents to read at most; None reads all."""

    def first(self, documents: int) -> "JobPart":
        """A part of the first documents alone; a later job must not take it for the whole one."""
        return replace(self, most_documents=documents, identity=f"{self.identity}[:{documents}]")


def parts_of(
    files: Sequence[InputFile],
    settings: str,
    part_bytes: int,
    on_input_bytes: OnInputBytes,
    share: Share = WHOLE,
) -> Iterator[JobPart]:
    """Every part of the inputs, in order.

    `settings` stands for all options that decide a part's bytes and goes into its identity.
    """
    extents: list[Extent] = []
    number = 0
    size = 0
    for extent in extents_of_all(files, part_bytes, on_input_bytes, share):
        if extents and (size + extent.size > part_bytes or len(extents) == PART_EXTENTS):
            yield make_part(number, extents, files, settings)
            extents = []
            size = 0
            number += 1
        extents.append(extent)
        size += extent.size
    if extents:
        yield make_part(number, extents, files, settings)


def make_part(
    number: int, extents: Sequence[Extent], files: Sequence[InputFile], settings: str
) -> JobPart:
    """A part with its identity."""
    content = repr([settings, *(extent.identity(files[extent.file].stamp) for extent in extents)])
    identity = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()
    return JobPart(number, tuple(extents), identity)
