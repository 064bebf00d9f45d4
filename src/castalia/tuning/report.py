"""What `castalia tune` prints and writes of a search, and the sizes that it reads."""

import json
import re
from pathlib import Path

import yaml

from castalia.core.errors import ConfigError
from castalia.core.files import atomic_write
from castalia.monitor.display import size_text
from castalia.tuning.search import Tuned

HEADER = ["micro-batch", "recompute", "compile", "precision", "tokens/s", "±", "memory", ""]
UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def bytes_of(text: str) -> int:
    """`8GiB`, `8G` or a number of bytes; binary units, as everywhere here.

    Raises  ConfigError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtb]?)(?:i?b)?\s*", text.lower())
    if match is None or not float(match[1]):
        raise ConfigError(f"--memory {text}: expected a size such as 8GiB or 500MiB")
    return int(float(match[1]) * UNITS[match[2]])


def table(tuned: Tuned) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a choice each, by size."""
    rows = []
    best = tuned.best
    for each in sorted(tuned.results, key=lambda result: result.choice.micro):
        choice = each.choice
        row = [str(choice.micro), json.dumps(choice.recompute).strip('"')]
        row += [json.dumps(choice.compile), choice.precision]
        if each.status == "measured":
            mark = "fits"
            if each is best:
                mark = "fastest that fits"
            row += [f"{each.rate:,.0f}", f"{each.spread:.1%}", size_text(each.peak), mark]
        else:
            note = ""
            if each.note:
                note = f": {each.note}"
            row += ["", "", f"~{size_text(each.expected)}", f"{each.status}{note}"]
        rows.append(row)
    return HEADER, rows


def write_overrides(tuned: Tuned, path: str | Path) -> Path:
    """Write the best choice as a config file, to be named behind the config of the run.

    Raises  CastaliaError if the file cannot be written.
    """
    best = tuned.best
    assert best is not None
    values: dict[str, object] = {}
    for key, value in best.choice.overrides(tuned.config).items():
        section, _, name = key.rpartition(".")
        place = values.setdefault(section, {}) if section else values
        assert isinstance(place, dict)
        place[name] = value
    with atomic_write(path) as file:
        file.write("# written by castalia tune: the fastest way to compute a run on one machine\n")
        yaml.safe_dump(values, file, sort_keys=False)
    return Path(path)
