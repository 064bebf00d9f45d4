"""Another optimizer over a preset or a file: its own defaults in place of the other's options."""

import inspect
from typing import Any

from castalia.config.base import Config
from castalia.config.kinds import inside
from castalia.config.values import Layers, Values
from castalia.optim import OPTIMIZERS

DEFAULT = "adamw"


def fit_optimizer(layers: Layers) -> list[str]:
    """Take out of the weaker layers what is another optimizer's: a rate or betas that were chosen
    for AdamW are no choice for Lion.

    Options that both kinds share in meaning stay, such as the clip, and under a kind without a rate
    of its own also the rate. Returns notes.
    """
    kind = inside(layers.resolved().get("optim"), "kind") or DEFAULT
    base_kind = inside(layers.base.get("optim"), "kind") or DEFAULT
    files_kind = inside(layers.files.get("optim"), "kind") or base_kind
    if any(name not in OPTIMIZERS for name in (kind, base_kind, files_kind)):
        # The config refuses it with the menu.
        return []
    layers.base, dropped = without(layers.base, base_kind, kind)
    layers.files, others = without(layers.files, files_kind, kind)
    names = sorted({*dropped, *others})
    if not names:
        return []
    listed = ", ".join(f"optim.{name}" for name in names)
    before = base_kind if dropped else files_kind
    return [f"optim.kind {kind} has its own {listed}: those given for {before} do not hold for it"]


def without(values: Values, old: str, new: str) -> tuple[Values, list[str]]:
    """`values` without the options of the optimizer `old` that mean something else, or nothing,
    under `new`; and the names of these."""
    section = values.get("optim")
    if old == new or not isinstance(section, dict):
        return values, []
    before, after = (OPTIMIZERS[name].Config for name in (old, new))
    kept = {
        key: value
        for key, value in section.items()
        if key == "kind" or origin(before, key) is origin(after, key)
    }
    return {**values, "optim": kept}, sorted(section.keys() - kept.keys())


def origin(config: type[Config], key: str) -> Any:
    """The class that declares the option `key` for a config class; None if it has no such
    option."""
    for cls in config.__mro__:
        if key in inspect.get_annotations(cls):
            return cls
    return None
