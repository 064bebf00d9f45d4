"""Rows of prefill, and what `auto` owes its peers at a level, for benchmarks/inference.py."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from levels import describe_level, instructions
from machine import ratio

from castalia.machine import this_machine
from castalia.native import compiled

PREFILL = (128, 512, 2000)
"""Tokens of the prompts whose first token is timed, one prompt at a time."""
MIXED = (32, 480, 64, 300, 16, 200, 128, 400)
"""Tokens of the prompts of a mixed batch."""
OURS = ("native fp32", "native bf16", "native int8")
"""Choices of ours that `auto` may not fall behind; int4 is none of them, as it loses accuracy."""
AUTO = "native auto"
OWN_SHARE = 0.95
MEMORY_SHARE = 0.7
SCORERS_OF_GOAL = ("transformers fp32", "transformers bf16", "ct2 float32", "ct2 int8")
BF16 = {"avx512_bf16", "amx_bf16"}


def describe_kernels(level: str) -> dict[str, Any]:
    """The level, what kernels may use at it, and the level of the compiled step."""
    step = compiled.level() or "none"
    words = f"{instructions(this_machine())}; compiled step: {step}"
    return describe_level(level) | {"compiled_step": step, "words": words}


def best(rows: Mapping[str, Any], names: Iterator[str] | tuple[str, ...]) -> str | None:
    """The name whose median time is the smallest."""
    medians = {name: statistics.median(rows[name]["rounds"]) for name in names if name in rows}
    return min(medians, key=lambda name: medians[name], default=None)


def auto_goals(
    what: str, rows: Mapping[str, Any], wanted: float, peers: tuple[str, ...] | None = None
) -> list[dict[str, Any]]:
    """`auto` against its best peer, and against the best other choice of ours, in one row."""
    if AUTO not in rows:
        return []
    theirs = peers or tuple(name for name in rows if not name.startswith("native"))
    goals = []
    for names, least in ((theirs, wanted), (OURS, OWN_SHARE)):
        other = best(rows, names)
        if other is not None:
            got = ratio(rows[other]["rounds"], rows[AUTO]["rounds"])
            goals.append({"what": f"{what}: auto / {other}", "wanted": least, **got})
    return goals


def level_goals(record: Mapping[str, Any], size: str) -> list[dict[str, Any]]:
    """All that `auto` owes at this level."""
    goals = []
    for batch, rows in record["decoding"].items():
        goals += auto_goals(f"{size} decoding, batch {batch}", rows, 1.0)
    for name, rows in record["prefill"].items():
        goals += auto_goals(f"{size} first token, {name}", rows, 1.0)
    has_bf16 = not BF16.isdisjoint(record["instructions"].split())
    wanted = 2.3 if has_bf16 else 1.2
    goals += auto_goals(f"{size} scoring", record["scoring"], wanted, SCORERS_OF_GOAL)
    share = record["decoding"].get("1", {}).get("native int8", {}).get("share_of_memory_limit")
    if share is not None:
        what = f"{size} int8, batch 1: share of the memory rate"
        goals.append({"what": what, "wanted": MEMORY_SHARE, **share})
    return goals
