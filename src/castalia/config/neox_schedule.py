"""Rules for DeepSpeed's `scheduler` in GPT-NeoX files, and for schedules at a resume."""

from typing import Any

from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong

WARMUPS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
MENU = (*WARMUPS, "OneCycle")


def scheduler(o: NeoxOptions, out: NeoxReading) -> None:
    """DeepSpeed takes its own scheduler in place of GPT-NeoX's, whose options then do nothing.

    Source  DeepSpeed, deepspeed/runtime/lr_schedules.py; runtime/engine.py,
            _configure_lr_scheduler.
    """
    given = o["scheduler"]
    if not given:
        return
    kind = given.get("type")
    params = given.get("params") or {}
    if kind == "LRRangeTest":
        wrong(out, "scheduler.type LRRangeTest: delete it and run `castalia lr-find FILES`")
        return
    if kind not in MENU:
        wrong(out, f"unknown scheduler.type {kind!r}; choose one of {', '.join(MENU)}")
        return
    if kind == "OneCycle":
        one_cycle(o, out, params)
    else:
        with_warmup(o, out, kind, params)
    note(
        out,
        f"scheduler {kind} of DeepSpeed takes the place of lr_decay_style, warmup and min_lr, as in"
        " DeepSpeed; its first update, at rate 0 there, has the rate of the second here",
        "schedule.name",
    )


def with_warmup(o: NeoxOptions, out: NeoxReading, kind: str, params: dict[str, Any]) -> None:
    """A rise, by default logarithmic, and what follows it."""
    optimizer = (o["optimizer"] or {}).get("params") or {}
    low = float(params.get("warmup_min_lr", 0.0))
    peak = float(params.get("warmup_max_lr", 0.001))
    steps = int(params.get("warmup_num_steps", 1000))
    total = params.get("total_num_steps")
    floor = low
    name = {"WarmupLR": "constant", "WarmupDecayLR": "polynomial", "WarmupCosineLR": "cosine"}[kind]
    if kind == "WarmupCosineLR":
        # Shares of the optimizer's rate.
        peak = float(optimizer.get("lr", 0.001))
        low = peak * float(params.get("warmup_min_ratio", 0.01))
        floor = peak * float(params.get("cos_min_ratio", 0.0001))
    if kind != "WarmupLR" and total is None:
        wrong(out, f"scheduler {kind} needs params.total_num_steps", "schedule.decay_steps")
        return
    shape = str(params.get("warmup_type", "log"))
    if shape not in ("log", "linear"):
        wrong(out, f"unknown scheduler.params.warmup_type {shape!r}; choose log or linear")
        return
    values: dict[str, Any] = {
        "schedule.name": name,
        "schedule.warmup_steps": steps,
        "schedule.warmup_start": low,
        "schedule.warmup_shape": shape,
        "schedule.min_lr": 0.0 if kind == "WarmupLR" else floor,
        "schedule.decay_steps": total,
        "optim.lr": peak,
    }
    put_all(o, out, values)


def one_cycle(o: NeoxOptions, out: NeoxReading, params: dict[str, Any]) -> None:
    """A straight rise and a straight fall; the decay after them is not here."""
    if params.get("decay_step_size") and params.get("decay_lr_rate"):
        wrong(
            out,
            "scheduler OneCycle with decay_lr_rate falls on after its cycle; delete decay_lr_rate,"
            " or write lr_decay_style",
        )
        return
    missing = [name for name in ("cycle_min_lr", "cycle_max_lr") if name not in params]
    if missing:
        wrong(out, f"scheduler OneCycle needs params.{' and params.'.join(missing)}", "optim.lr")
        return
    first = int(params.get("cycle_first_step_size", 2000))
    second = int(params.get("cycle_second_step_size") or first)
    values = {
        "schedule.name": "polynomial",
        "schedule.warmup_steps": first,
        "schedule.warmup_start": float(params["cycle_min_lr"]),
        "schedule.min_lr": float(params["cycle_min_lr"]),
        "schedule.decay_steps": first + second,
        "optim.lr": float(params["cycle_max_lr"]),
    }
    put_all(o, out, values)
    if params.get("cycle_momentum", True):
        note(
            out,
            "scheduler OneCycle: the momentum does not cycle here; it is that of optim.betas",
            "schedule.name",
        )


def put_all(o: NeoxOptions, out: NeoxReading, values: dict[str, Any]) -> None:
    """Set dotted keys that follow from the scheduler."""
    for path, value in values.items():
        o.put(out, path, value, "scheduler")


def of_checkpoint(o: NeoxOptions, out: NeoxReading) -> None:
    """use_checkpoint_lr_scheduler takes the values in the checkpoint, override_lr_scheduler those
    of the file; with neither they must be equal, as here at every resume."""
    if o["use_checkpoint_lr_scheduler"]:
        note(
            out,
            "use_checkpoint_lr_scheduler: a run resumes with the schedule of its own folder; one"
            " that begins with `load` has the one of this file",
            "schedule.name",
        )


SCHEDULE_RULES: list[tuple[tuple[str, ...], OptionRule]] = [
    (("scheduler",), scheduler),
    (("use_checkpoint_lr_scheduler",), of_checkpoint),
]
