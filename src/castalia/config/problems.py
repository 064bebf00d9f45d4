"""Pydantic's errors in Castalia's words: a dotted key, what was expected, what was given, a hint.

Pydantic speaks to programmers ("Input should be a valid integer, unable to parse string as an
integer") and reports a union once for each member. Here each key gets one sentence for the person
who wrote the config.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from castalia.config.fields import field_at, kind_of, leaves, names_at
from castalia.config.foreign import ABSENT, OURS
from castalia.config.kinds import Kind, inside

CHOOSERS = ("kind", "name", "type", "class", "family")
"""Keys by which users of other libraries choose the member of a section."""
VERY_ALIKE = 0.76
"""Similarity (difflib's ratio) from which a name is a hint: `gpu` must not suggest `cpu`."""
ALIKE = 0.6
"""The same for each word of a name: `save_every` must not suggest `eval_every`."""
LONGEST = 80
"""Characters of a value that a message repeats."""

EXPECTED = {
    "bool_type": ["true", "false"],
    "bool_parsing": ["true", "false"],
    "int_type": ["an integer"],
    "int_parsing": ["an integer"],
    "int_parsing_size": ["an integer"],
    "int_from_float": ["an integer"],
    "float_type": ["a number"],
    "float_parsing": ["a number"],
    "finite_number": ["a finite number"],
    "string_type": ["text"],
    "string_unicode": ["text in UTF-8"],
    "list_type": ["a list"],
    "tuple_type": ["a list"],
    "set_type": ["a list"],
    "iterable_type": ["a list"],
    "dict_type": ["a mapping of keys to values"],
    "mapping_type": ["a mapping of keys to values"],
    "model_type": ["a section of keys and values"],
    "model_attributes_type": ["a section of keys and values"],
    "section": ["a section of keys and values"],
    "none_required": ["null"],
}
"""Pydantic's error types about the kind of a value, and what was expected in its place."""

CHOICES = ("literal_error", "enum")
"""Pydantic's error types about a name that is none of a fixed list."""

LIMITS = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "too_short": "must have at least {min_length} values",
    "too_long": "must have at most {max_length} values",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
}
"""Pydantic's error types about a value of the right kind that is out of bounds."""


class ProblemsError(ValueError):
    """Raised by a validator that found several problems; each is reported as a line of its own."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class Problem(NamedTuple):
    """One fault of a config."""

    key: str
    """Dotted key, empty for a rule that spans the whole config."""
    text: str
    """The sentence for the user, with the key in front."""
    unknown: bool = False
    """The key does not exist."""
    missing: bool = False
    """The key needs a value and has none."""


def problems_of(
    root: type[BaseModel], errors: Sequence[ErrorDetails], values: Any
) -> list[Problem]:
    """The problems behind pydantic's errors about `values`, in pydantic's order.

    A key has one problem, except where a validator of ours raises ProblemsError.
    """
    groups: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for item in errors:
        groups.setdefault(path_of(item, values), []).append(item)
    parents = {path[:end] for path in groups for end in range(len(path))}
    problems = []
    for path, items in groups.items():
        # A mapping with a faulty value is also "not text" to a union; the value's line is enough.
        if path in parents and all(item["type"] in EXPECTED for item in items):
            continue
        cause = items[0].get("ctx", {}).get("error")
        if isinstance(cause, ProblemsError):
            key = ".".join(path)
            problems += [
                Problem(key, f"{key}: {text}".removeprefix(": ")) for text in cause.problems
            ]
        else:
            problems.append(problem_at(root, list(path), items, values))
    return problems


def path_of(item: ErrorDetails, values: Any) -> tuple[str, ...]:
    """The keys that lead to the faulty value.

    Pydantic puts the member of a union (`constrained-int`, `dict[str,str]`) among them. A name that
    the values lack at that place is such a member, unless the error is about a missing key.
    """
    missing = item["type"] == "missing"
    path: list[str] = []
    for part in item["loc"]:
        if isinstance(values, Mapping) and (part in values or missing):
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue  # also the second number that a pair lacks: the fault is the list's length
        path.append(str(part))
    if item["type"] == "unknown_kind":
        path.append(str(item["ctx"]["key"]))
    return tuple(path)


def problem_at(
    root: type[BaseModel], path: list[str], items: list[ErrorDetails], values: Any
) -> Problem:
    """The problem of the key at `path`, out of all that pydantic says about it."""
    key = ".".join(path)
    first = items[0]
    if first["type"] == "extra_forbidden" or first["type"] == "invalid_key":
        return Problem(key, f"{key}: unknown key{hint_for(root, path, values)}", unknown=True)
    if first["type"] == "missing" and not isinstance(first["loc"][-1], int):
        return Problem(key, f"{key}: a value is required", missing=True)
    text = sentence(items)
    if first["type"] in ("model_type", "section"):
        text += chooser_hint(root, path, first["input"])
    if not path:
        return Problem("", text)  # a rule that spans the sections of the config
    return Problem(key, f"{key}: {text}")


def sentence(items: Sequence[ErrorDetails]) -> str:
    """What is wrong with one value; several errors are those of the members of a union."""
    # The last first: of the values that a list lacks, its number is the list's length.
    for item in reversed(items):
        # A bound is broken only by a value of the right kind: the other members do not matter.
        if item["type"] in LIMITS:
            return limit(item)
        if item["type"] not in EXPECTED and item["type"] not in CHOICES:
            return other(item)
    wanted: dict[str, None] = {}
    for item in items:
        wanted |= dict.fromkeys(EXPECTED.get(item["type"]) or choices(item))
    names = list(wanted)
    given = items[0]["input"]
    text = f"{either(names)}, got {shown(given)}"
    if len(items) == 1 and len(names) > 2:
        text = f"one of {', '.join(names)}, got {shown(given)}"
    close = difflib.get_close_matches(str(given), names, 1, VERY_ALIKE)
    if close:
        text += f"; did you mean {close[0]!r}?"
    return f"expected {text}"


def choices(item: ErrorDetails) -> list[str]:
    """The names that a field takes: pydantic lists them as `'a', 'b' or 'c'`."""
    text = str(item["ctx"]["expected"])
    return [name or number for name, number in re.findall(r"'([^']*)'|([\w.\-]+)(?=,|$)", text)]


def limit(item: ErrorDetails) -> str:
    """The sentence about a value out of bounds; for a list its length is what was given."""
    context = item.get("ctx", {})
    text = LIMITS[item["type"]].format(**context)
    if item["type"] == "string_too_short" and context["min_length"] == 1:
        return "must not be empty"
    text = re.sub(r"\b1 (value|character)s", r"1 \1", text)
    return f"{text}, got {context.get('actual_length', shown(item['input']))}"


def other(item: ErrorDetails) -> str:
    """An error of a validator of ours is a sentence already; any other loses pydantic's wording."""
    if item["type"] == "missing":
        return f"must have {int(item['loc'][-1]) + 1} values, got {shown(item['input'])}"
    if item["type"] in ("value_error", "assertion_error", "unknown_kind"):
        return re.sub(r"^(Value|Assertion) error, ", "", item["msg"])
    words = re.sub(r"^Input should be ", "expected ", item["msg"])
    return f"{words[:1].lower()}{words[1:]}, got {shown(item['input'])}"


def either(words: list[str]) -> str:
    """`a, b or c`."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def shown(value: Any) -> str:
    """A value as YAML has it, shortened if it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    if len(text) > LONGEST:
        return f"{text[: LONGEST - 1]}…"
    return text


def chooser_hint(root: type[BaseModel], path: list[str], value: Any) -> str:
    """For text where a section belongs: `optim=adamw` means `optim.kind=adamw`."""
    chooser = chooser_of(root, path)
    if chooser is None or not isinstance(value, str):
        return ""
    key = ".".join([*path, chooser])
    kind = kind_at(root, path)
    # A wrong hint is worse than none: `model=pythia-70m` is no family.
    if kind is not None and value not in kind.registry:
        return f"; {key} is one of {', '.join(kind.registry)}"
    return f"; did you mean {key}={value}?"


def kind_at(root: type[BaseModel], path: list[str], values: Any = None) -> Kind | None:
    """The choice by name that the section at `path` is; None for any other section."""
    field = field_at(root, path, values)
    if field is None:
        return None
    return kind_of(field)


def chooser_of(root: type[BaseModel], path: list[str], values: Any = None) -> str | None:
    """The key that chooses the member of the section at `path`; None if nothing does."""
    field = field_at(root, path, values)
    if field is None:
        return None
    kind = kind_of(field)
    if kind is not None:
        return kind.key
    names = names_at(root, path, values)
    return next((name for name in CHOOSERS if name in names), None)


def hint_for(root: type[BaseModel], path: list[str], values: Any = None) -> str:
    """The dotted key that an unknown key stands for, or the menu of its section.

    A wrong hint is worse than none. In this order: a name for which there is no key at all, a slip
    of the finger, another trainer's name, the name in another section, a name with a word more or
    less, a slip in another section.
    """
    *section, name = path
    prefix = "".join(f"{part}." for part in section)
    if section and name in CHOOSERS and (chooser := chooser_of(root, section, values)):
        return f"; did you mean '{prefix}{chooser}'{members(root, path, values)}?"
    names = names_at(root, section, values)
    everywhere = leaves(root)
    if prefix + name in everywhere:
        # Another member of a section that is chosen by name has this key.
        return f" of this {chooser_of(root, section, values)}; {menu_of(names)}"
    if name in ABSENT:
        return f"; {ABSENT[name]}"
    hints = [prefix + other for other in names if mistyped(name, other)]
    if not hints and OURS.get(name) in everywhere:
        hints = [OURS[name]]
    if not hints and name not in CHOOSERS:  # `schedule.name` is not a hint about `guard.name`
        hints = [other for other in everywhere if other.split(".")[-1] == name]
        hints = hints or [prefix + other for other in longer_or_shorter(name, names)]
        hints = hints or [other for other in everywhere if mistyped(name, other.split(".")[-1])]
    if not hints:
        return f"; {menu_of(names)}"
    return f"; did you mean {' or '.join(repr(hint) for hint in hints)}?"


def mistyped(name: str, other: str) -> bool:
    """Whether the words of two names differ by letters only: `lrr` and `lr`, `warmup_step` and
    `warmup_steps`, but not `save_every` and `eval_every`.
    """
    name = name.lower().replace("-", "_")
    words = name.split("_")
    others = other.split("_")
    if len(words) != len(others) or similarity(name, other) < VERY_ALIKE:
        return False
    return all(similarity(*pair) >= ALIKE for pair in zip(words, others, strict=True))


def longer_or_shorter(name: str, names: list[str]) -> list[str]:
    """The one of `names` that is most like `name` and has all of its words, or the reverse: `vocab`
    and `vocab_size`.
    """
    words = set(name.split("_"))
    near = [
        other for other in names if words < set(other.split("_")) or set(other.split("_")) < words
    ]
    return sorted(near, key=lambda other: -similarity(name, other))[:1]


def similarity(one: str, other: str) -> float:
    """difflib's ratio, 1 for equal texts and for swapped letters, of which it thinks too little."""
    if sorted(one) == sorted(other):
        return 1.0
    return difflib.SequenceMatcher(None, one, other).ratio()


def members(root: type[BaseModel], path: list[str], values: Any) -> str:
    """The menu of a section's members, if the value at `path` is none of them."""
    kind = kind_at(root, path[:-1], values)
    for name in path:
        values = inside(values, name)
    if kind is None or values in kind.registry:
        return ""
    return f" ({', '.join(sorted(kind.registry))})"


def menu_of(names: list[str]) -> str:
    """The keys of a section."""
    return f"choose one of {', '.join(names)}"
