"""`make_mixer`: a mixer by name, with what is put around it."""

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
"""Largest share under `odm` unless told otherwise, from four sources on: noise has a high loss for ever."""
AROUND = [
    "warmup_steps", "update_every", "weight_smoothing", "floor", "max_share", "epoch_cap", "horizon", "freeze_after",
    "allow_empty",
]  # fmt: skip
"""Options that every mixer has."""
VECTORS = ("target", "reference")
"""Options with one number a source."""


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
    """The mixer `name` of `MIXERS` over `sources`, with everything that is asked for around it.

    prior             shares that it starts with and holds in warm-up; uniform without one.
    sizes             (K,) tokens of each source, for the mixers that follow them and for `epoch_cap`.
    warmup_steps      steps at the prior.
    update_every      steps between updates.
    weight_smoothing  the past's part in a running mean of the shares.
    floor             mass of all floors together. max_share: largest share; for `odm` 0.5 from four sources on.
    epoch_cap         most passes over a source in a run of `horizon` tokens, which are unimax's budget too.
    freeze_after      step after which the shares stand.
    allow_empty       sources of size 0 get weight 0 and count nowhere; otherwise they are an error.
    options           the mixer's own: smoothing, eps, target, reference, temperature, ...

    Raises  ConfigError for an unknown name or option, or a value out of range.
    """
    names = check_sources(sources)
    keep = filled(names, sizes, allow_empty)
    lengths = None if sizes is None else read_sizes(sizes, names)[keep]
    start = normalise(read_shares(prior, names)[keep])
    mixer = bare(name, names, keep, start, lengths, horizon, options)
    if max_share is None and name == "odm":
        max_share = ODM_MAX_SHARE if len(keep) >= 4 else 1.0
    mixer = Every(mixer, steps=update_every) if update_every != 1 else mixer
    mixer = Smooth(mixer, past=weight_smoothing) if weight_smoothing else mixer
    mixer = Floor(mixer, total=floor) if floor else mixer
    mixer = Clip(mixer, most=max_share) if max_share is not None else mixer
    mixer = Freeze(mixer, after=freeze_after) if freeze_after is not None else mixer
    factor = options.get("guard", ODM_GUARD) if name == "odm" else None
    mixer = Warmup(mixer, steps=warmup_steps, factor=factor) if warmup_steps else mixer
    if epoch_cap is not None:
        if lengths is None or horizon is None:
            raise ConfigError(
                "epoch_cap needs sizes= of the sources and horizon=, the tokens of the whole run"
            )
        mixer = EpochCap(mixer, sizes=lengths, max_epochs=epoch_cap, horizon=horizon)
    mixer = Within(mixer, names) if allow_empty else mixer
    mixer.settings = {
        "name": name,
        "warmup_steps": warmup_steps,
        "update_every": update_every,
        "floor": floor,
    }
    mixer.settings |= {
        "weight_smoothing": weight_smoothing,
        "max_share": max_share,
        "epoch_cap": epoch_cap,
    }
    mixer.settings |= {
        key: value for key, value in options.items() if isinstance(value, int | float | str | bool)
    }
    return mixer


def bare(
    name: str,
    names: Sequence[str],
    keep: Sequence[int],
    prior: Vector,
    lengths: Vector | None,
    horizon: float | None,
    options: Mapping[str, Any],
) -> Mixer:
    """The mixer itself, over the sources at the places `keep`.

    Raises  ConfigError if there is no such mixer or option, or its value is out of range.
    """
    kind = MIXERS[name]
    check_options(name, kind, options)
    vectors = {key for key in VECTORS if options.get(key) is not None}
    given = {
        key: by_source(value, names, key)[keep] if key in vectors else value
        for key, value in options.items()
    }
    if "sizes" in inspect.signature(kind).parameters:
        given["sizes"] = lengths
    if name == "unimax":
        given.setdefault("budget", horizon)
    try:
        return kind([names[i] for i in keep], prior=prior, **given)
    except TypeError as error:
        raise ConfigError(f"mixer {name!r}: an option is of the wrong type: {error}") from error


def check_options(name: str, kind: type[Mixer], options: Mapping[str, Any]) -> None:
    """Raise ConfigError if the mixer has no such option, with the menu."""
    have = [
        key
        for key in inspect.signature(kind).parameters
        if key not in ("sources", "prior", "sizes")
    ]
    for key in options:
        if key not in have:
            menu = ", ".join(have) or "none"
            raise ConfigError(
                f"mixer {name!r} has no option {key!r}; its own: {menu}{nearest(key, have + AROUND)}"
            )


def filled(
    names: Sequence[str], sizes: ArrayLike | Mapping[str, float] | None, allow_empty: bool
) -> list[int]:
    """Places of the sources that are not empty.

    Raises  ConfigError if one is empty and may not be, or all are.
    """
    if sizes is None:
        return list(range(len(names)))
    lengths = read_sizes(sizes, names)
    empty = [name for name, length in zip(names, lengths, strict=True) if length == 0]
    if empty and not allow_empty:
        raise ConfigError(
            f"source {empty[0]!r} is empty; take it out, or pass allow_empty=True to give it weight 0"
        )
    if len(empty) == len(names):
        raise ConfigError("every source is empty: there is nothing to mix")
    return [int(i) for i in np.flatnonzero(lengths)]
