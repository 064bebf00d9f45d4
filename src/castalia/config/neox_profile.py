"""The profilers of GPT-NeoX: torch's trace, the memory snapshot, DeepSpeed's counter of FLOPs."""

from typing import TYPE_CHECKING, Any

from castalia.config.neox_option import Honoured

if TYPE_CHECKING:
    # At run time this file is read by what these come from: it has a part of the table of options.
    from castalia.config.neox_reading import NeoxOptions, NeoxReading

PROFILE_OPTIONS = {
    "profile": Honoured("profile.steps", "bool", False),
    "profile_step_start": Honoured("profile.steps", "int", 10),
    "profile_step_stop": Honoured("profile.steps", "int", 12),
    "memory_profiling": Honoured("profile.memory", "bool", False),
    "memory_profiling_path": Honoured("profile.memory_folder", "str"),
    "flops_profiler": Honoured("profile.flops", "dict"),
}
FLOPS_HONOURED = "enabled profile_step top_modules"
FLOPS_IGNORED = "module_depth detailed output_file recompute_fwd_factor"
"""Keys inside `flops_profiler`: the table has operations, and stands in the run's folder."""
FLOPS_STEP = 1
"""DeepSpeed's default of profile_step, updates before the one that it looks at."""


def profiling(o: "NeoxOptions", out: "NeoxReading") -> None:
    """The window of steps, and what is recorded in it.

    GPT-NeoX counts the steps that are done: from profile_step_start of them on it records
    profile_step_stop - profile_step_start further ones.
    Source  GPT-NeoX, megatron/training.py, train: the schedule of torch's profiler (wait, one step
            of warmup, active) advances before each step.
    """
    flops: dict[str, Any] = o["flops_profiler"] or {}
    counts = bool(flops.get("enabled"))
    windows = []
    names: tuple[str, ...] = ()
    if o["profile"] or o["memory_profiling"]:
        first = o["profile_step_start"] + 1
        windows.append([first, max(first, o["profile_step_stop"])])
        names = ("profile", "memory_profiling", "profile_step_start", "profile_step_stop")
    elif counts:
        step = flops.get("profile_step", FLOPS_STEP) + 1
        windows.append([step, step])
        names = ("flops_profiler",)
    if not windows:
        return
    o.put(out, "profile.steps", windows, *names)
    o.put(out, "profile.memory", o["memory_profiling"], "memory_profiling")
    if o.has("memory_profiling_path"):
        o.put(out, "profile.memory_folder", o["memory_profiling_path"], "memory_profiling_path")
    if counts and flops.get("top_modules", 0) > 0:
        o.put(out, "profile.top", flops["top_modules"], "flops_profiler")
    # GPT-NeoX's trace has all of it.
    o.put(out, "profile.flops", bool(o["profile"]) or counts, "profile", "flops_profiler")
    if o["profile"]:
        o.put(out, "profile.shapes", True, "profile")
        o.put(out, "profile.stacks", True, "profile")


PROFILE_RULES = [(tuple(PROFILE_OPTIONS), profiling)]
