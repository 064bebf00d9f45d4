"""The `curriculum_learning` section of GPT-NeoX: lengths of the rows by step.

Source  DeepSpeed, deepspeed/runtime/data_pipeline/curriculum_scheduler.py.
"""

from collections.abc import Mapping
from typing import Any

from castalia.config.neox_reading import NeoxOptions, NeoxReading, note, wrong
from castalia.core.errors import nearest

KINDS = {"fixed_linear": "linear", "fixed_root": "root", "fixed_discrete": "discrete"}
NUMBERS = {
    "total_curriculum_step": "steps",
    "difficulty_step": "length_step",
    "root_degree": "root_degree",
}
STAGES = {"difficulty": "lengths", "max_step": "until"}


def curriculum(o: NeoxOptions, out: NeoxReading) -> None:
    """Set the `curriculum` section."""
    section = o["curriculum_learning"] or {}
    if not section.get("enabled", False):
        return
    label = "curriculum_learning"
    if section.get("curriculum_type", "seqlen") != "seqlen":
        wrong(out, f"{label}.curriculum_type {section['curriculum_type']!r}: write seqlen", label)
        return
    style = str(section.get("schedule_type"))
    if style not in KINDS:
        wrong(
            out,
            f"unknown {label}.schedule_type {style!r}; choose one of {', '.join(KINDS)}"
            f"{nearest(style, KINDS)}",
            "curriculum.kind",
        )
        return
    o.put(out, "curriculum.kind", KINDS[style], label)
    bounds = {"min_difficulty": "shortest", "max_difficulty": "longest"}
    # The lengths of a discrete curriculum stand in its stages.
    bounds = bounds if style != "fixed_discrete" else {}
    put_all(o, out, section, bounds, label)
    inner = section.get("schedule_config") or {}
    keys = STAGES if style == "fixed_discrete" else NUMBERS
    put_all(o, out, inner, keys, f"{label}.schedule_config")
    if (o["pipe_parallel_size"] or 0) < 1:
        note(
            out,
            "curriculum_learning: GPT-NeoX shortens rows under pipe_parallel_size >= 1 alone; here"
            " they are shortened on every layout",
            "curriculum",
        )


def put_all(
    o: NeoxOptions,
    out: NeoxReading,
    values: Mapping[str, Any],
    keys: Mapping[str, str],
    where: str,
) -> None:
    """Set our key for each of theirs; a missing one is a problem, as in DeepSpeed, but root_degree,
    which one schedule alone has."""
    missing = []
    for theirs, ours in keys.items():
        if theirs in values:
            o.put(out, f"curriculum.{ours}", values[theirs], "curriculum_learning")
        elif theirs != "root_degree":
            missing.append(theirs)
    if missing:
        wrong(out, f"{where} lacks {', '.join(missing)}", "curriculum.kind")
