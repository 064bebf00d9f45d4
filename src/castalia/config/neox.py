"""Reads GPT-NeoX YAML unchanged: one or many files, `-` or `_`, trailing commas, v1.0 or newer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from castalia.config.neox_adapter import ADAPTER_RULES
from castalia.config.neox_blocks import BLOCK_RULES
from castalia.config.neox_experts import EXPERT_RULES
from castalia.config.neox_files import FILE_RULES, same_folder
from castalia.config.neox_keys import (
    ALIASES,
    CHECKED,
    HONOURED,
    NAMES,
    NESTED_HONOURED,
    NESTED_IGNORED,
    NESTED_REFUSED,
    REFUSED,
    WHY,
)
from castalia.config.neox_model import MODEL_RULES
from castalia.config.neox_monitor import MONITOR_RULES
from castalia.config.neox_mup import MUP_RULES
from castalia.config.neox_option import Refused
from castalia.config.neox_profile import PROFILE_RULES
from castalia.config.neox_reading import NeoxOptions, NeoxReading, wrong
from castalia.config.neox_rules import TRAINING_RULES
from castalia.config.neox_schedule import SCHEDULE_RULES
from castalia.config.neox_storage import STORAGE_RULES
from castalia.config.neox_telemetry import TELEMETRY_RULES
from castalia.config.neox_train_impl import TRAIN_IMPL_RULES
from castalia.core.errors import nearest

LAYER_RULES = [*MODEL_RULES, *EXPERT_RULES, *BLOCK_RULES]
"""Those of the model. Experts count from the MLP's width, and layers without attention drop what
they do not have."""
LATER_RULES = [
    *ADAPTER_RULES,
    *MUP_RULES,
    *SCHEDULE_RULES,
    *PROFILE_RULES,
    *TELEMETRY_RULES,
    *MONITOR_RULES,
]
"""Those that come after the optimizer's and the schedule's own options."""
SHAPE = ("num_layers", "hidden_size", "num_attention_heads")
OURS = {
    "adapter",
    "model",
    "data",
    "mixing",
    "train",
    "optim",
    "schedule",
    "parallel",
    "recipe",
    "output",
    "device",
}
"""Top-level keys of Castalia's configs that GPT-NeoX does not have."""


class ValueKind(NamedTuple):
    """A kind of value: its name in messages, and its Python types."""

    name: str
    types: tuple[type, ...]


KINDS = {
    "int": ValueKind("an integer", (int,)),
    "number": ValueKind("a number", (int, float)),
    "bool": ValueKind("true or false", (bool,)),
    "str": ValueKind("text", (str,)),
    "list": ValueKind("a list", (list,)),
    "dict": ValueKind("a mapping", (dict,)),
}
LITERALS = {"None": None, "True": True, "False": False}
FOLDERS = ("save", "load")
"""Options whose values are compared as folders, not as text."""


def is_neox(values: Mapping[str, Any]) -> bool:
    """Whether the top-level keys of a YAML file are GPT-NeoX's and not Castalia's."""
    # The one name of both: a section here, a switch there.
    if OURS & values.keys() or isinstance(values.get("profile"), Mapping):
        return False
    return any(normal(key) in NAMES for key in values)


def normal(key: object) -> str:
    """GPT-NeoX's spelling of a key: `-` is `_`."""
    return str(key).replace("-", "_")


def override_hint(key: str) -> str | None:
    """The override that replaces one under a GPT-NeoX name; None if `key` is not such a name."""
    name = ALIASES.get(normal(key), normal(key))
    if name in HONOURED:
        return f"{key}: this is GPT-NeoX's name; here it is {HONOURED[name].path}"
    if name in WHY:
        return f"{key}: this is GPT-NeoX's name and has no effect here ({WHY[name]})"
    if name in REFUSED:
        return f"{key}: this is GPT-NeoX's name and is not honoured here; {REFUSED[name].hint}"
    return None


def read_neox(
    files: Mapping[str, Mapping[str, Any]], *, world: int | None = None, complete: bool = True
) -> NeoxReading:
    """Translate GPT-NeoX files into nested values of a run's config.

    files     name -> top-level values, in order
    world     world size, for files without train_batch_size; None means 1
    complete  fill in GPT-NeoX's defaults for options that no file names; false over a preset

    Collects problems, notes and ignored options in the result and raises nothing: all problems are
    shown at once, and an override may settle one by setting its `key`.
    """
    out = NeoxReading()
    options = NeoxOptions(joined(files, out), out.origins, world or 1, complete)
    for name, value in list(options.given.items()):
        classify(name, value, options, out)
    report_refused(out)
    # One problem about the missing model, not one for each key that it would have set.
    if complete and not any(options.has(name) for name in SHAPE):
        named = ", ".join(Path(file).name for file in files)
        missing = ", ".join(SHAPE)
        wrong(
            out, f"no model in {named}: name a preset or the file with {missing} as well", "model"
        )
        return out
    for name, option in HONOURED.items():
        if option.plain and (options.has(name) or (complete and option.default is not None)):
            options.put(out, option.path, options[name], name)
    rules = [*LAYER_RULES, *TRAINING_RULES, *FILE_RULES, *STORAGE_RULES]
    for keys, rule in [*rules, *TRAIN_IMPL_RULES, *LATER_RULES]:
        if complete or any(options.has(key) for key in keys):
            rule(options, out)
    return out


def joined(files: Mapping[str, Mapping[str, Any]], out: NeoxReading) -> dict[str, Any]:
    """The options of all files in one spelling.

    Two files with different values of one option are a problem. GPT-NeoX refuses equal ones too.
    """
    options: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for file, values in files.items():
        for key, value in values.items():
            name = ALIASES.get(normal(key), normal(key))
            # GPT-NeoX's files contain Python's literals, of which YAML reads None as text.
            if isinstance(value, str):
                value = LITERALS.get(value, value)
            # Compared in one spelling: GPT-NeoX itself misses `a-b` beside `a_b`.
            if name in options and not same(name, options[name], value):
                remedy = "give an option in one file only"
                if owner[name] == file:
                    remedy = "`-` and `_` are one: keep one of the two"
                wrong(
                    out,
                    f"{name} is {brief(options[name])} in {owner[name]} and {brief(value)} in"
                    f" {file}; {remedy}",
                    HONOURED[name].path if name in HONOURED else "",
                )
            owner[name] = file
            options[name] = value
            out.origins[name] = f"{key} in {Path(file).name}"
    return options


def same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of the option `name` mean the same."""
    if name in FOLDERS and isinstance(one, str) and isinstance(other, str):
        return same_folder(one, other)
    # Python counts True as 1.
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def classify(name: str, value: Any, options: NeoxOptions, out: NeoxReading) -> None:
    """Classify one option: check the type of an honoured one, list an ignored one, refuse the
    rest."""
    where = out.origins[name]
    if name in HONOURED:
        if value is None:
            options.drop(name)
        elif not fits(value, HONOURED[name].kind):
            wrong(out, f"{where}: expected {KINDS[HONOURED[name].kind].name}, got {value!r}")
            # Dropped, so that no rule works on a value of the wrong kind.
            options.drop(name)
        elif isinstance(value, dict) and name in NESTED_HONOURED:
            options.given[name] = nested(name, value, where, out)
        elif HONOURED[name].kind == "int":
            options.given[name] = int(value)
    elif name in WHY:
        out.ignored.setdefault(WHY[name], []).append(name)
    elif name in REFUSED:
        refuse(name, value, REFUSED[name], where, out)
    elif name not in CHECKED:
        wrong(out, f"{where}: not an option of GPT-NeoX{nearest(name, NAMES)}")


def fits(value: Any, kind: str) -> bool:
    """Whether a YAML value is of the kind; Python counts a bool as an int, a config does not."""
    if kind == "int" and isinstance(value, float):
        return value.is_integer()  # 1e5 steps
    return isinstance(value, KINDS[kind].types) and (kind == "bool" or not isinstance(value, bool))


def refuse(name: str, value: Any, option: Refused, where: str, out: NeoxReading) -> None:
    """Record a problem, or list the option as ignored if its value changes nothing."""
    if any(
        value == good and isinstance(value, bool) == isinstance(good, bool)
        for good in option.harmless
    ):
        out.ignored.setdefault("set to what is done here anyway", []).append(name)
    else:
        out.refused.setdefault(option.hint, []).append((where, brief(value)))


def report_refused(out: NeoxReading) -> None:
    """One problem for all refused options with the same remedy."""
    for hint, options in out.refused.items():
        where, value = options[0]
        more = len(options) - 1
        others = ""
        if more:
            others = f", like {more} more option{'s' if more > 1 else ''} of its kind"
        wrong(out, f"{where}: {value} changes the results and is not honoured{others}; {hint}")


def brief(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nested(path: str, values: dict[str, Any], where: str, out: NeoxReading) -> dict[str, Any]:
    """The honoured part of a DeepSpeed dictionary; the rest is ignored, refused or unknown."""
    kept: dict[str, Any] = {}
    good = NESTED_HONOURED[path].split()
    skip = NESTED_IGNORED[path].split()
    refused = {key.removeprefix(f"{path}."): option for key, option in NESTED_REFUSED.items()}
    for key, value in values.items():
        name = normal(key)
        if name in good:
            deeper = isinstance(value, dict) and f"{path}.{name}" in NESTED_HONOURED
            kept[name] = nested(f"{path}.{name}", value, where, out) if deeper else value
        elif name in skip:
            out.ignored.setdefault("DeepSpeed's own", []).append(f"{path}.{name}")
        elif name in refused:
            refuse(f"{path}.{name}", value, refused[name], f"{name} of {where}", out)
        else:
            near = nearest(name, [*good, *skip, *refused])
            wrong(out, f"{path}.{key} in {where}: unknown key{near}")
    return kept
