"""Reads GPT-NeoX YAML as it is: one or many files, `-` or `_`, trailing commas, v1.0 or newer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from castalia.config.neox_files import FILE_RULES
from castalia.config.neox_keys import (
    ALIASES,
    CHECKED,
    HONOURED,
    NAMES,
    NESTED_HONOURED,
    NESTED_IGNORED,
    NESTED_REFUSED,
    REFUSED,
    STRANGERS,
    WHY,
    Refused,
)
from castalia.config.neox_reading import Options, Reading, wrong
from castalia.config.neox_rules import MODEL_RULES
from castalia.core.errors import nearest

SHAPE = ("num_layers", "hidden_size", "num_attention_heads")
OURS = {
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
"""Top-level keys that only a config of ours has."""


class ValueKind(NamedTuple):
    """A kind of value: how it is called and which Python types it takes."""

    name: str
    types: tuple[type, ...]


KINDS = {
    "int": ValueKind("a whole number", (int,)),
    "number": ValueKind("a number", (int, float)),
    "bool": ValueKind("true or false", (bool,)),
    "str": ValueKind("text", (str,)),
    "list": ValueKind("a list", (list,)),
    "dict": ValueKind("a mapping", (dict,)),
}
LITERALS = {"None": None, "True": True, "False": False}


def is_neox(values: Mapping[str, Any]) -> bool:
    """Whether a YAML file's top-level keys are GPT-NeoX's and not ours."""
    return not OURS & values.keys() and any(normal(key) in NAMES for key in values)


def normal(key: object) -> str:
    """GPT-NeoX's spelling of a key: `-` is `_`."""
    return str(key).replace("-", "_")


def override_hint(key: str) -> str | None:
    """What to write in place of a GPT-NeoX name as an override; None if `key` is no such name."""
    name = ALIASES.get(normal(key), normal(key))
    if name in HONOURED:
        return f"{key}: this is GPT-NeoX's name; here it is {HONOURED[name].path}"
    if name in WHY:
        return f"{key}: this is GPT-NeoX's name and has no effect here ({WHY[name]})"
    return (
        f"{key}: this is GPT-NeoX's name and is not honoured here; {REFUSED[name].hint}"
        if name in REFUSED
        else None
    )


def read_neox(
    files: Mapping[str, Mapping[str, Any]], *, world: int | None = None, complete: bool = True
) -> Reading:
    """Translate GPT-NeoX files into nested values of our config.

    files     name -> top-level values, in order
    world     number of processes, for files that name no train_batch_size; None takes one
    complete  fill in GPT-NeoX's defaults for options that no file names; false when a preset stands below

    Collects problems, notes and ignored options in the Reading; raises nothing. A caller that lays overrides on top
    drops the problems and notes whose `key` an override sets.
    """
    out = Reading()
    options = Options(joined(files, out), out.origins, world or 1, complete)
    for name, value in list(options.given.items()):
        classify(name, value, options, out)
    report_refused(out)
    if complete and not any(options.has(name) for name in SHAPE):
        named, missing = ", ".join(Path(file).name for file in files), ", ".join(SHAPE)
        wrong(
            out, f"no model in {named}: name a preset or the file with {missing} as well", "model"
        )
        return out
    for name, option in HONOURED.items():
        if option.plain and (options.has(name) or (complete and option.default is not None)):
            options.put(out, option.path, options[name], name)
    for keys, rule in [*MODEL_RULES, *FILE_RULES]:
        if complete or any(options.has(key) for key in keys):
            rule(options, out)
    if complete:
        refuse_defaults(options, out)
    return out


def joined(files: Mapping[str, Mapping[str, Any]], out: Reading) -> dict[str, Any]:
    """All files' options under one spelling; an option in two files is a problem, as in GPT-NeoX."""
    options: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for file, values in files.items():
        for key, value in values.items():
            name = ALIASES.get(normal(key), normal(key))
            if owner.get(name, file) != file:
                wrong(
                    out,
                    f"{name} stands in {owner[name]} and in {file}; an option may stand in one file only",
                )
            owner[name] = file
            options[name] = LITERALS.get(value, value) if isinstance(value, str) else value
            out.origins[name] = f"{key} in {Path(file).name}"
    return options


def classify(name: str, value: Any, options: Options, out: Reading) -> None:
    """Sort one option: honoured values are checked for their type, ignored ones listed, the rest are problems."""
    where = out.origins[name]
    if name in HONOURED:
        if value is None:
            options.drop(name)
        elif not fits(value, HONOURED[name].kind):
            wrong(out, f"{where}: expected {KINDS[HONOURED[name].kind].name}, got {value!r}")
            options.drop(name)
        elif isinstance(value, dict):
            options.given[name] = nested(name, value, where, out)
    elif name in WHY:
        out.ignored.setdefault(WHY[name], []).append(name)
    elif name in REFUSED:
        refuse(name, value, REFUSED[name], where, out)
    elif name in STRANGERS:
        wrong(out, f"{where}: not an option of GPT-NeoX; {STRANGERS[name]}")
    elif name not in CHECKED:
        wrong(out, f"{where}: not an option of GPT-NeoX{nearest(name, NAMES)}")


def fits(value: Any, kind: str) -> bool:
    """Whether a YAML value is of the kind; a bool is no number."""
    return isinstance(value, KINDS[kind].types) and (kind == "bool" or not isinstance(value, bool))


def refuse(name: str, value: Any, option: Refused, where: str, out: Reading) -> None:
    """A problem unless the value is harmless; harmless ones are listed as ignored."""
    if any(
        value == good and isinstance(value, bool) == isinstance(good, bool)
        for good in option.harmless
    ):
        out.ignored.setdefault("set to what is done here anyway", []).append(name)
    else:
        out.refused.setdefault(option.hint, []).append((where, brief(value)))


def report_refused(out: Reading) -> None:
    """One problem for all refused options with the same remedy."""
    for hint, options in out.refused.items():
        (where, value), more = options[0], len(options) - 1
        others = f", like {more} more option{'s' if more > 1 else ''} of its kind" if more else ""
        wrong(out, f"{where}: {value} changes the results and is not honoured{others}; {hint}")


def refuse_defaults(options: Options, out: Reading) -> None:
    """Problems that a silent file has: GPT-NeoX's default is refused."""
    for name, option in REFUSED.items():
        if name not in options.given and option.default not in (None, *option.harmless):
            wrong(
                out,
                f"{name} is not given and GPT-NeoX's default is {option.default!r}; {option.hint}",
            )


def brief(value: Any) -> str:
    """A value for a message, cut when long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nested(path: str, values: dict[str, Any], where: str, out: Reading) -> dict[str, Any]:
    """The honoured part of one of DeepSpeed's dictionaries; the rest is ignored, refused or unknown."""
    kept: dict[str, Any] = {}
    good, skip = NESTED_HONOURED[path].split(), NESTED_IGNORED[path].split()
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
            wrong(
                out, f"{path}.{key} in {where}: not known{nearest(name, [*good, *skip, *refused])}"
            )
    return kept
