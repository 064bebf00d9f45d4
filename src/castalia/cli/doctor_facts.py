"""What `castalia doctor` says, as plain values: FLOP/s, bytes, bytes a second."""

import os
import platform
from typing import Any

import torch

import castalia
from castalia.cli.doctor_choices import choices
from castalia.cli.doctor_kernels import kernel_facts
from castalia.core.compilers import chosen_compiler
from castalia.core.extras import EXTRAS, installed_version, pip_command
from castalia.core.files import cache_folder
from castalia.machine import Machine, this_machine
from castalia.native import compiled

NAMED = ("numpy", "tokenizers", "safetensors", "gigatoken", "orjson")
"""Packages whose versions are worth a look beside torch's."""


def examined(anew: bool) -> dict[str, Any]:
    """All of it; `anew` measures the machine's table again."""
    machine = this_machine(anew=anew)
    return {
        "versions": versions(),
        "machine": machine_facts(machine),
        "gpus": gpu_facts(),
        "compiled_step": step_facts(),
        "kernels": kernel_facts(),
        "cache": cache_facts(),
        "products": product_facts(machine),
        "measured_seconds": machine.seconds,
        "busy": machine.busy,
        "choices": choices(machine),
        "extras": extra_facts(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Castalia, Python and the packages that decide about speed and formats."""
    known: dict[str, str | None] = {
        "castalia": castalia.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return known | {name: installed_version(name) for name in NAMED}


def machine_facts(machine: Machine) -> dict[str, Any]:
    """The processor and the memory."""
    return {
        "processor": machine.processor,
        "level": machine.level,
        "instructions": list(machine.instructions),
        "caps": dict(machine.caps),
        "cores": machine.cores,
        "threads": machine.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_rate": machine.memory_rate,
    }


def gpu_facts() -> list[dict[str, Any]]:
    """Each GPU that torch finds."""
    cards = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return [{"name": card.name, "memory_bytes": card.total_memory} for card in cards]


def step_facts() -> dict[str, Any]:
    """The level at which the compiled step runs here, and what could build it."""
    compiler = chosen_compiler()
    command = None if compiler is None else " ".join(compiler)
    return {"level": compiled.level(), "compiler": command}


def cache_facts() -> dict[str, Any]:
    """The user's cache folder."""
    folder = cache_folder()
    # What is missing can be made if the nearest folder above it can be written.
    place = next(path for path in (folder, *folder.parents) if path.exists())
    return {"folder": str(folder), "writable": place.is_dir() and os.access(place, os.W_OK)}


def product_facts(machine: Machine) -> dict[str, list[dict[str, Any]]]:
    """The table: by dtype the best library and its rate for each number of rows."""
    table = {}
    for dtype, libraries in machine.rates.items():
        sizes = sorted({rows for rates in libraries.values() for rows in rates})
        table[dtype] = [
            {
                "rows": rows,
                "rate": machine.rate(dtype, rows),
                "library": machine.library(dtype, rows),
            }
            for rows in sizes
        ]
    return table


def extra_facts() -> list[dict[str, Any]]:
    """Every optional part, whether it is installed, and the command that installs it."""
    facts = []
    for name, extra in EXTRAS.items():
        packages = extra.versions()
        facts.append(
            {
                "name": name,
                "gives": extra.gives,
                "installed": None not in packages.values(),
                "packages": packages,
                "command": pip_command(name),
            }
        )
    return facts
