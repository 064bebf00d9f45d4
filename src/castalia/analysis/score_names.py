"""What the names in a results table say: size, seed and family of a model, group of a task."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SIZE = re.compile(r"(?:^|(?<=[-_.]))(\d+(?:[.bm]\d+)?[kmbt]?)(?=$|[-_.])", re.IGNORECASE)
"""A size in the name of a model: 70m, 1.4b, and BLOOM's 1b7."""
SEED = re.compile(r"[-_.]?seed[-_]?(\d+)", re.IGNORECASE)
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
LEAST = 3
"""Tasks that make a group."""
GROUPS = {
    r"hendrycksTest-.+": "MMLU (hendrycksTest)",
    r"mmlu_(?!stem$|other$|social_sciences$|humanities$).+": "MMLU",
    r"blimp_.+": "BLiMP",
    r"crows_pairs_english_.+": "CrowS-Pairs, English by kind",
    r"crows_pairs_french_.+": "CrowS-Pairs, French by kind",
    r"arithmetic_.+": "arithmetic",
    r"num_reasoning_arithmetic_addition_\d+": "addition by operand (num_reasoning)",
    r"num_reasoning_arithmetic_multiplication_\d+": "multiplication by operand (num_reasoning)",
    r"wino_bias_.*_pro\b.*": "WinoBias, pro-stereotypical",
    r"wino_bias_.*_anti\b.*": "WinoBias, anti-stereotypical",
    r"bits_per_byte/.+": "bits per byte by source",
}
"""Names of tasks that belong together -> title. The totals that a harness reports beside the parts
of a benchmark (`mmlu_stem`, `crows_pairs_english`) are in no group: they would count twice."""


class ModelName(NamedTuple):
    """A row of the table of models."""

    suite: str
    model: str
    variant: str
    seed: int | None
    size: str | None
    parameters: int | None


def size_of(name: ModelName) -> tuple[str, float]:
    """Label of the size, and parameters to order it by; ("", 0) for one that nothing tells."""
    label = name.size or size_in(SEED.sub("", name.model))
    if label:
        return label.lower(), float(name.parameters or parameters_of(label))
    if name.parameters:
        return short_number(name.parameters), float(name.parameters)
    return "", 0.0


def size_in(model: str) -> str:
    """The size that a model's name gives; "" without one."""
    for match in SIZE.finditer(model):
        # A number alone is a version or a step, such as gpt-2.
        if match[1][-1].isalpha() or re.search(r"[bm]", match[1], re.IGNORECASE):
            return match[1]
    return ""


def parameters_of(size: str) -> float:
    """Parameters of a size such as 70m, 1.4b, 1b7; 0 for text that is none."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([kmbt])(\d*)", size.lower())
    if not match:
        return 0.0
    whole, part, unit, after = match.groups()
    return float(f"{whole}.{part or after or 0}") * UNITS[unit]


def short_number(count: float) -> str:
    """A number of parameters in the manner of names: 70m, 1.4b, 12b."""
    for unit in ("b", "m", "k"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:.3g}{unit}"
    return f"{count:.0f}"


def family_of(name: ModelName) -> str:
    """What the models of several sizes and seeds share in their name; "" for nothing."""
    rest = SEED.sub("", name.model)
    size = size_in(rest)
    if size:
        rest = re.sub(rf"(^|[-_.]){re.escape(size)}(?=$|[-_.])", "", rest, count=1)
    return rest.strip("-_.")


def families(names: Sequence[ModelName]) -> list[str]:
    """The family of each model.

    Models of a suite whose names tell no size, such as tiny and small, are one family if their
    sizes differ: then it is the size that the suite varies.
    """
    chosen = [family_of(name) for name in names]
    suites: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        if size_in(SEED.sub("", name.model)) == "":
            suites[name.suite, name.variant].append(place)
    for (suite, _), places in suites.items():
        stems = {chosen[place]: names[place].parameters for place in places}
        sizes = set(stems.values())
        if len(stems) > 1 and None not in sizes and len(sizes) == len(stems):
            for place in places:
                chosen[place] = suite
    return [family or name.suite for family, name in zip(chosen, names, strict=True)]


def groups_of(tasks: Iterable[str]) -> dict[str, tuple[str, list[str]]]:
    """Title -> pattern and tasks of each group that has at least three of them."""
    names = sorted(set(tasks))
    groups: dict[str, tuple[str, list[str]]] = {}
    for pattern, title in GROUPS.items():
        inside = [name for name in names if re.fullmatch(pattern, name)]
        if len(inside) >= LEAST:
            groups[title] = (pattern, inside)
    return groups
