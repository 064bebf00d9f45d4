"""Shares that are >= 0 and sum to 1: reading them, flooring them, capping them."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, nearest

Vector = NDArray[np.float64]
SLACK = 1e-3
"""Shares that a person wrote may sum to 1 up to this, for rounding; they are then normalised."""


def check_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """The names of the K >= 1 sources, each once.

    Raises  ConfigError.
    """
    names = tuple(sources)
    if not names or isinstance(sources, str):
        raise ConfigError(f"sources: expected a list of at least one name, got {sources!r}")
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ConfigError(
            f"sources: {wrong[0]!r} is no name; a state is keyed by them, so write each as text"
        )
    twice = (
        sorted({name for name in names if names.count(name) > 1})
        if len(set(names)) < len(names)
        else []
    )
    if twice:
        raise ConfigError(
            f"sources: {', '.join(map(repr, twice))} named more than once; give each source its own name"
        )
    return names


def by_source(values: ArrayLike | Mapping[str, float], sources: Sequence[str], what: str) -> Vector:
    """One number a source, out of a list in the order of the sources or a mapping by name.

    Shapes  -> (K,) float64.
    Raises  ConfigError if a source is missing, unknown, or its number is not finite.
    """
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in sources]
        if unknown:
            hint = nearest(unknown[0], sources)
            raise ConfigError(
                f"{what}: no source {unknown[0]!r}; have: {', '.join(sources[:20])}{hint}"
            )
        missing = [name for name in sources if name not in values]
        if missing:
            raise ConfigError(
                f"{what}: nothing for source {missing[0]!r}; give one number a source"
            )
        values = [values[name] for name in sources]
    try:
        vector = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{what}: expected {len(sources)} numbers, one a source: {error}"
        ) from None
    if vector.shape != (len(sources),):
        raise ConfigError(
            f"{what}: expected {len(sources)} numbers, one a source, got shape {vector.shape}"
        )
    if not np.isfinite(vector).all():
        raise ConfigError(
            f"{what}: source {sources[int(np.argmin(np.isfinite(vector)))]!r} has no finite number"
        )
    return vector


def read_sizes(
    sizes: ArrayLike | Mapping[str, float], sources: Sequence[str], what: str = "sizes"
) -> Vector:
    """Sizes >= 0 of the sources, (K,) float64, in tokens or rows.

    Raises  ConfigError if one is negative.
    """
    vector = by_source(sizes, sources, what)
    if vector.min() < 0:
        raise ConfigError(
            f"{what}: source {sources[int(vector.argmin())]!r} has {vector.min():g}; expected >= 0"
        )
    return vector


def read_shares(
    shares: ArrayLike | Mapping[str, float] | None, sources: Sequence[str], what: str = "prior"
) -> Vector:
    """A distribution over the sources, (K,) float64; None is the uniform one.

    Raises  ConfigError if a share is negative or they do not sum to 1 within 1e-3.
    """
    if shares is None:
        return np.full(len(sources), 1 / len(sources))
    vector = read_sizes(shares, sources, what)
    total = float(vector.sum())
    if abs(total - 1) > SLACK:
        right = (
            f"; divided by their sum: {(vector / total).round(4).tolist()}"
            if total > 0 and len(vector) < 20
            else ""
        )
        raise ConfigError(f"{what}: shares must sum to 1, got {total:g}{right}")
    return vector / total


def normalise(vector: Vector) -> Vector:
    """`vector` >= 0 divided by its sum; uniform if that is 0."""
    total = vector.sum()
    return vector / total if total > 0 else np.full(len(vector), 1 / len(vector))


def gibbs(scores: Vector) -> Vector:
    """exp(s_i) / sum_j exp(s_j), without overflow."""
    raised = np.exp(scores - scores.max())
    return raised / raised.sum()


def cap(shares: Vector, most: Vector | float) -> Vector:
    """The shares held below `most`, what is over given to the others in proportion to their shares.

    Shapes  shares (K,) on the simplex; most (K,) or one number. Where the caps sum to less than 1 they all bind and
            the result is the caps, normalised.
    """
    if (shares <= most).all():
        return shares
    limits = np.broadcast_to(np.asarray(most, np.float64), shares.shape)
    if limits.sum() <= 1:
        return normalise(limits)
    out, full = shares.copy(), np.zeros(len(shares), bool)
    while (out > limits * (1 + 1e-12)).any():
        full |= out >= limits
        out[full] = limits[full]
        left, others = 1 - limits[full].sum(), shares[~full].sum()
        out[~full] = (
            shares[~full] * (left / others) if others > 1e-100 else fill(limits[~full], left)
        )
    return out


def towards(now: Vector, goal: Vector, factor: float) -> Vector:
    """The farthest point on the line from `now` to `goal` at which no share has changed by more than `factor`.

    A share that is 0 now may have any value then. Shapes  (K,) and (K,) on the simplex -> (K,) on it.
    """
    if (goal <= now * factor).all() and (goal >= now / factor).all():
        return goal
    moved = np.abs(goal - now)
    room = np.where(goal > now, now * (factor - 1), now * (1 - 1 / factor))
    held = (moved > room) & (now > 0)
    part = float((room[held] / moved[held]).min()) if held.any() else 1.0
    return now + part * (goal - now)


def fill(limits: Vector, left: float) -> Vector:
    """`left` spread evenly over places that hold at most `limits`: the smallest first, as UniMax does."""
    out = np.zeros(len(limits))
    order = np.argsort(limits, kind="stable")
    for done, place in enumerate(order):
        out[place] = min(left / (len(order) - done), limits[place])
        left -= out[place]
    return out
