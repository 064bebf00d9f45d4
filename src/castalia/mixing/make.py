"""`make_mixer`: builds a mixer by name and wraps it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError, nearest
from castalia.mixing.bandits import ODM_GUARD
from castalia.mixing.combinators import Clip, EpochCap, Every, Floor, Freeze, Smooth, Warmup, Within
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import (
    Vector,
    by_source,
    check_sources,
    normalise,
    read_shares,
    read_sizes,
)

ODM_MAX_SHARE = 0.5
"""Default largest share under `odm` from four sources on: noise keeps a high loss forever."""
AROUND = [
    "warmup_steps", "update_every", "weight_smoothing", "floor", "max_share", "epoch_cap",
    "horizon", "freeze_after", "allow_empty",
]  # fmt: skip
"""Options that every mixer takes."""
VECTORS = ("target", "reference")
"""Options with one number per source."""


def make_mixer(
    name: str,
    sources: Sequence[str],
    *,
    prior: ArrayLike | Mapping[str, float] | None = None,
    sizes: ArrayLike | Mapping[str, float] | None = None,
    warmup_steps: int = 0,
    update_every: int = 1,
    weight_smoothing: float = 0.0,
    floor: float = 0.0,
    max_share: float | None = None,
    epoch_cap: float | None = None,
    horizon: float | None = None,
    freeze_after: int | None = None,
    allow_empty: bool = False,
    **options: Any,
) -> Mixer:
    """Build the mixer `name` of `MIXERS` over `sources`, with the wrappers that are set.

    prior             initial shares, held during warm-up; uniform by default.
    sizes             (K,) tokens of each source, for mixers that follow them and for `epoch_cap`.
    warmup_steps      steps at the prior.
    update_every      steps between updates.
    weight_smoothing  weight of the past in a running mean of the shares.
    floor             mass of all floors together.
    max_share         largest share; for `odm` 0.5 from four sources on.
    epoch_cap         maximum passes over a source in a run of `horizon` tokens. `horizon` is also
                      the budget of unimax.
    freeze_after      step after which the shares stay fixed.
    allow_empty       give sources of size 0 weight 0 and ignore them; otherwise they are an error.
    options           the mixer's own: smoothing, eps, target, reference, temperature, ...

    Raises  ConfigError for an unknown name or option, or a value out of range.
    """
    names = check_sources(sources)
    keep = nonempty(names, sizes, allow_empty)
    lengths = None if sizes is None else read_sizes(sizes, names)[keep]
    start = normalise(read_shares(prior, names)[keep])
    mixer = bare(name, names, keep, start, lengths, horizon, options)
    guard = None
    if name == "odm":
        guard = options.get("guard", ODM_GUARD)
        if max_share is None:
            max_share = ODM_MAX_SHARE if len(keep) >= 4 else 1.0
    around: dict[str, Any] = {"warmup_steps": warmup_steps, "update_every": update_every}
    around |= {"floor": floor, "weight_smoothing": weight_smoothing, "max_share": max_share}
    mixer = wrap(mixer, **around, freeze_after=freeze_after, guard=guard)
    if epoch_cap is not None:
        mixer = cap_epochs(mixer, epoch_cap, lengths, horizon)
    if allow_empty:
        mixer = Within(mixer, names)
    plain = {key: value for key, value in options.items() if isinstance(value, int | float | str)}
    mixer.settings = {"name": name, **around, "epoch_cap": epoch_cap, **plain}
    return mixer


def wrap(
    mixer: Mixer,
    *,
    warmup_steps: int,
    update_every: int,
    floor: float,
    weight_smoothing: float,
    max_share: float | None,
    freeze_after: int | None,
    guard: float | None,
) -> Mixer:
    """Put wrappers around a mixer, innermost first.

    The order matters. The cap comes after smoothing and floor, which could otherwise exceed it.
    Warm-up comes last, because nothing may change its prior.

    guard  largest factor by which a share changes in a step after warm-up; None for no limit.
    """
    if update_every != 1:
        mixer = Every(mixer, steps=update_every)
    if weight_smoothing:
        mixer = Smooth(mixer, past=weight_smoothing)
    if floor:
        mixer = Floor(mixer, total=floor)
    if max_share is not None:
        mixer = Clip(mixer, most=max_share)
    if freeze_after is not None:
        mixer = Freeze(mixer, after=freeze_after)
    if warmup_steps:
        mixer = Warmup(mixer, steps=warmup_steps, factor=guard)
    return mixer


def cap_epochs(
    mixer: Mixer, max_epochs: float, lengths: Vector | None, horizon: float | None
) -> Mixer:
    """Limit the passes over each source in a run of `horizon` tokens.

    Raises  ConfigError without sizes or horizon.
    """
    if lengths is None or horizon is None:
        raise ConfigError(
            "epoch_cap needs sizes= of the sources and horizon=, the tokens of the whole run"
        )
    return EpochCap(mixer, sizes=lengths, max_epochs=max_epochs, horizon=horizon)


def bare(
    name: str,
    names: Sequence[str],
    keep: Sequence[int],
    prior: Vector,
    lengths: Vector | None,
    horizon: float | None,
    options: Mapping[str, Any],
) -> Mixer:
    """Build the unwrapped mixer over the sources at the places `keep`.

    Raises  ConfigError for an unknown mixer or option, or a value out of range.
    """
    kind = MIXERS[name]
    check_options(name, kind, options)
    arguments = dict(options)
    for key in VECTORS:
        if options.get(key) is not None:
            arguments[key] = by_source(options[key], names, key)[keep]
    if "sizes" in inspect.signature(kind).parameters:
        arguments["sizes"] = lengths
    if name == "unimax":
        arguments.setdefault("budget", horizon)
    try:
        return kind([names[i] for i in keep], prior=prior, **arguments)
    except TypeError as error:
        raise ConfigError(f"mixer {name!r}: an option has the wrong type: {error}") from error


def check_options(name: str, kind: type[Mixer], options: Mapping[str, Any]) -> None:
    """Check that the mixer has the options.

    Raises  ConfigError for an unknown option, with the menu.
    """
    parameters = list(inspect.signature(kind).parameters)
    own = [key for key in parameters if key not in ("sources", "prior", "sizes")]
    for key in options:
        if key not in own:
            menu = ", ".join(own) or "none"
            raise ConfigError(
                f"unknown option {key!r} of mixer {name!r}; its own: {menu}"
                f"{nearest(key, own + AROUND)}"
            )


def nonempty(
    names: Sequence[str], sizes: ArrayLike | Mapping[str, float] | None, allow_empty: bool
) -> list[int]:
    """Places of the sources that are not empty.

    Raises  ConfigError if all sources are empty, or one is and `allow_empty` is False.
    """
    if sizes is None:
        return list(range(len(names)))
    lengths = read_sizes(sizes, names)
    empty = [name for name, length in zip(names, lengths, strict=True) if length == 0]
    if empty and not allow_empty:
        raise ConfigError(
            f"source {empty[0]!r} is empty; remove it, or pass allow_empty=True to give it weight 0"
        )
    if len(empty) == len(names):
        raise ConfigError("all sources are empty; at least one needs rows")
    return [int(i) for i in np.flatnonzero(lengths)]
