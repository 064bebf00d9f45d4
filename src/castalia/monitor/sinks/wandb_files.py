"""The last step in the files that W&B writes without a network, RUN/wandb/offline-run-*/*.wandb.

A killed process leaves what its last flush had written, every 15 seconds or so. The files say what
that was.
Format  LevelDB's log: blocks of 32 KiB, after 7 bytes of the file's own; in each, fragments of CRC
        (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last) and content. The joined
        content is a protocol buffer `Record` of wandb.proto.
Source  https://github.com/google/leveldb, doc/log_format.md.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7
"""Bytes before a fragment, and before the first one of a file."""
WHOLE = 1
FIRST = 2
MIDDLE = 3
LAST = 4


def last_step_in(folder: Path, run: str) -> int | None:
    """The last step of the history of the run with the id `run`: 0 if there are files of it without
    a step, None if there are none, as on another machine."""
    # Without its types, which no checker sees: the module defines them when it is imported.
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    paths = sorted(folder.glob(f"offline-run-*-{run}/run-{run}.wandb"))
    # The newest first: each start has a folder of its own, which continues those before it. The
    # last one is that of this start and has no step yet.
    for path in reversed(paths):
        last = None
        for content in records(path.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                last = record.history.step.num
        if last is not None:
            return last
    return 0 if len(paths) > 1 else None


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file; what a killed process left unfinished is left out."""
    place = HEADER
    content = b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            # A fragment's header is not split: the end of the block is filled with zeros.
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        place += HEADER
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or place + length > len(data):
            return
        piece = data[place : place + length]
        place += length
        content = piece if kind in (WHOLE, FIRST) else content + piece
        if kind in (WHOLE, LAST):
            yield content
