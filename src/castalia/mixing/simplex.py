"""Points on the simplex, that is shares >= 0 that sum to 1: parsing, capping, normalizing."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, nearest

Vector = NDArray[np.float64]
SLACK = 1e-3
"""Tolerance on the sum of shares written by a person, who rounds; they are then normalized."""


def check_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """Check the names of the K >= 1 sources.

    Raises  ConfigError if a name is empty, not a string, or given twice.
    """
    names = tuple(sources)
    if not names or isinstance(sources, str):
        raise ConfigError(f"sources: expected a list of at least one name, got {sources!r}")
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ConfigError(
            f"sources: {wrong[0]!r} is not a name; states are keyed by name, so each must be a"
            " non-empty string"
        )
    # The set first: counting every name is quadratic.
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(
            f"sources: {', '.join(map(repr, twice))} named more than once; give each source its"
            " own name"
        )
    return names


def by_source(values: ArrayLike | Mapping[str, float], sources: Sequence[str], what: str) -> Vector:
    """One number per source, from a list in the order of the sources or a mapping by name.

    what    name of the option, for errors.
    Shapes  -> (K,) float64.
    Raises  ConfigError if a source is missing or unknown, or its number is not finite.
    """
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in sources]
        if unknown:
            hint = nearest(unknown[0], sources)
            raise ConfigError(
                f"{what}: unknown source {unknown[0]!r}; choose one of"
                f" {', '.join(sources[:20])}{hint}"
            )
        missing = [name for name in sources if name not in values]
        if missing:
            raise ConfigError(
                f"{what}: source {missing[0]!r} is missing; give one number per source"
            )
        values = [values[name] for name in sources]
    try:
        vector = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{what}: expected {len(sources)} numbers, one per source: {error}"
        ) from None
    if vector.shape != (len(sources),):
        raise ConfigError(
            f"{what}: expected {len(sources)} numbers, one per source, got shape {vector.shape}"
        )
    if not np.isfinite(vector).all():
        place = int(np.argmin(np.isfinite(vector)))
        raise ConfigError(
            f"{what}: source {sources[place]!r} has {vector[place]:g}; expected a finite number"
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
        place = int(vector.argmin())
        raise ConfigError(f"{what}: source {sources[place]!r} has {vector[place]:g}; expected >= 0")
    return vector


def read_shares(
    shares: ArrayLike | Mapping[str, float] | None, sources: Sequence[str], what: str = "prior"
) -> Vector:
    """A distribution over the sources, (K,) float64; None is uniform.

    Raises  ConfigError if a share is negative or the sum differs from 1 by more than 1e-3.
    """
    if shares is None:
        return np.full(len(sources), 1 / len(sources))
    vector = read_sizes(shares, sources, what)
    total = float(vector.sum())
    if abs(total - 1) > SLACK:
        hint = ""
        if total > 0 and len(vector) < 20:
            hint = f"; divided by their sum: {(vector / total).round(4).tolist()}"
        raise ConfigError(f"{what}: shares must sum to 1, got {total:g}{hint}")
    return vector / total


def normalise(vector: Vector) -> Vector:
    """`vector` >= 0 divided by its sum; uniform if the sum is 0."""
    total = vector.sum()
    if total > 0:
        return vector / total
    return np.full(len(vector), 1 / len(vector))


def gibbs(scores: Vector) -> Vector:
    """Softmax: exp(s_i) / sum_j exp(s_j)."""
    # Shifting by the maximum changes nothing but prevents overflow.
    raised = np.exp(scores - scores.max())
    return raised / raised.sum()


def cap(shares: Vector, most: Vector | float) -> Vector:
    """Cap the shares at `most`; the excess goes to the others in proportion to their shares.

    If the caps sum to at most 1, all of them bind and the result is the normalized caps.

    Shapes  shares (K,) on the simplex; most (K,) or one number -> (K,) on the simplex.
    """
    if (shares <= most).all():
        return shares
    limits = np.broadcast_to(np.asarray(most, np.float64), shares.shape)
    if limits.sum() <= 1:
        return normalise(limits)
    out = shares.copy()
    full = np.zeros(len(shares), bool)
    # Lifting the others may push one of them over its cap, so repeat; each round fills one.
    while (out > limits * (1 + 1e-12)).any():
        full |= out >= limits
        out[full] = limits[full]
        left = 1 - limits[full].sum()
        others = shares[~full].sum()
        if others > 1e-100:
            out[~full] = shares[~full] * (left / others)
        else:
            # Shares of 0 have no proportions to keep: spread evenly.
            out[~full] = fill(limits[~full], left)
    return out


def towards(now: Vector, goal: Vector, factor: float) -> Vector:
    """Move from `now` towards `goal` until a share has changed by `factor`.

    The move is along a line, so the result stays on the simplex. A share of 0 does not limit it.

    Shapes  (K,) and (K,) on the simplex -> (K,) on the simplex.
    """
    if (goal <= now * factor).all() and (goal >= now / factor).all():
        return goal
    moved = np.abs(goal - now)
    room = np.where(goal > now, now * (factor - 1), now * (1 - 1 / factor))
    limiting = (moved > room) & (now > 0)
    fraction = 1.0
    if limiting.any():
        fraction = float((room[limiting] / moved[limiting]).min())
    return now + fraction * (goal - now)


def fill(limits: Vector, left: float) -> Vector:
    """Spread `left` evenly over places that take at most `limits`, smallest limit first.

    Shapes  limits (K,) -> (K,), which sums to min(left, sum of the limits).
    Source  Chung et al. 2023 (UniMax), arXiv:2304.09151, algorithm 1.
    """
    out = np.zeros(len(limits))
    order = np.argsort(limits, kind="stable")
    for done, place in enumerate(order):
        out[place] = min(left / (len(order) - done), limits[place])
        left -= out[place]
    return out
