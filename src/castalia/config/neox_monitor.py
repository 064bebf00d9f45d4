"""GPT-NeoX's options about monitors: TensorBoard, Weights & Biases and Comet are sinks here."""

from importlib.util import find_spec
from typing import Any

from castalia.config.neox_monitor_keys import HOST, MONITOR_OPTIONS
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note
from castalia.core.extras import pip_command

SERVICES = {"wandb": "Weights & Biases", "comet": "Comet"}
"""Sinks that send numbers away, by the name of the service."""
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Sink -> the module that it needs."""


def monitors(o: NeoxOptions, out: NeoxReading) -> None:
    """The sinks that a file turns on; one whose library is missing is left out with a note, since
    published files name services that a reader may not have."""
    asked = {
        "tensorboard": (tensorboard(o), ("tensorboard_dir", "tensorboard")),
        "wandb": (wandb(o), ("use_wandb", "wandb")),
        "comet": (comet(o), ("use_comet",)),
    }
    sections = []
    names: list[str] = []
    for kind, (section, options) in asked.items():
        if section is None:
            continue
        given = next(name for name in options if o.has(name))
        if find_spec(MODULES[kind]) is None:
            note(
                out,
                f"{given}: monitor {kind} is left out, its library is not installed:"
                f" {pip_command(kind)}",
                "monitor.sinks",
            )
            continue
        sections.append({"kind": kind, **section})
        names += [name for name in options if o.has(name)]
    if sections:
        o.put(out, "monitor.sinks", sections, *names)
    services = [SERVICES[section["kind"]] for section in sections if section["kind"] in SERVICES]
    if services:
        note(
            out,
            f"the numbers of the run are sent to {' and '.join(services)}, as the file says;"
            " monitor.sinks=[] keeps them here",
            "monitor.sinks",
        )
    if o["wandb_init_all_ranks"]:
        note(
            out,
            "wandb_init_all_ranks: rank 0 writes the numbers of all ranks, in one run",
            "monitor.sinks",
        )


def tensorboard(o: NeoxOptions) -> dict[str, Any] | None:
    """The options of TensorBoard; None if it is off. A relative folder is in that of the run,
    because TensorBoard draws all runs of one folder as one."""
    section = o["tensorboard"] or {}
    folder = o["tensorboard_dir"]
    if folder is None and section.get("enabled"):
        parts = [section.get("output_path"), section.get("job_name")]
        folder = "/".join(str(part).rstrip("/") for part in parts if part) or "tb"
    return None if folder is None else {"folder": folder}


def wandb(o: NeoxOptions) -> dict[str, Any] | None:
    """The options of W&B; None if it is off."""
    section = o["wandb"] or {}
    if not (o["use_wandb"] or section.get("enabled")):
        return None
    project = o["wandb_project"]
    if not o.has("wandb_project"):
        project = section.get("project", project)
    values = {
        "project": project,
        "entity": o["wandb_team"] or section.get("team"),
        "group": o["wandb_group"] or section.get("group"),
        "name": o["wandb_run_name"],
        "host": o["wandb_host"] if o["wandb_host"] != HOST else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def comet(o: NeoxOptions) -> dict[str, Any] | None:
    """The options of Comet; None if it is off."""
    if not o["use_comet"]:
        return None
    values = {
        "workspace": o["comet_workspace"],
        "project": o["comet_project"],
        "name": o["comet_experiment_name"],
        "tags": o["comet_tags"],
        "others": o["comet_others"],
    }
    return {name: value for name, value in values.items() if value is not None}


MONITOR_RULES: list[tuple[tuple[str, ...], OptionRule]] = [(tuple(MONITOR_OPTIONS), monitors)]
"""The options that the rule reads, and the rule."""
