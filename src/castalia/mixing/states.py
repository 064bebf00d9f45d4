"""The state of a mixer as JSON, keyed by the names of its sources."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import CheckpointError, ConfigError, nearest


class Keeper(Protocol):
    """What has a state: a kind, sources, attributes by source, single numbers, a step, and what it wraps."""

    kind: str
    sources: tuple[str, ...]
    per_source: tuple[str, ...]
    scalars: tuple[str, ...]
    step: int
    inner: list[Any]


def write_state(mixer: Keeper) -> dict[str, Any]:
    """`{"kind", "step", "scalars": {name: number}, "sources": {source: {attribute: value}}, "inner": [state]}`."""
    columns = {name: getattr(mixer, name).tolist() for name in mixer.per_source}
    rows = {
        source: {name: columns[name][i] for name in columns}
        for i, source in enumerate(mixer.sources)
    }
    scalars = {name: getattr(mixer, name) for name in mixer.scalars}
    inner = [one.state_dict() for one in mixer.inner]
    return {
        "kind": mixer.kind,
        "step": mixer.step,
        "scalars": scalars,
        "sources": rows,
        "inner": inner,
    }


def read_state(mixer: Keeper, state: Mapping[str, Any], *, on_new: str, on_removed: str) -> bool:
    """Set the attributes of `mixer`; True if the sources are not the same.

    Raises  CheckpointError if the sources differ and no policy allows it, or something is missing.
    """
    try:
        rows, step = state["sources"], int(state["step"])
        kept, new = compare(mixer.sources, rows, on_new=on_new, on_removed=on_removed)
        for name in mixer.per_source:
            setattr(
                mixer, name, column(getattr(mixer, name), name, mixer.sources, rows, kept, on_new)
            )
        for name in mixer.scalars:
            setattr(mixer, name, type(getattr(mixer, name))(state["scalars"][name]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the state of mixer {mixer.kind!r} is damaged: {error!r}") from None
    mixer.step = step
    return bool(new) or len(kept) < len(rows)


def compare(
    sources: Sequence[str], have: Mapping[str, Any], *, on_new: str, on_removed: str
) -> tuple[list[int], list[str]]:
    """Places of the sources that the state knows, and the names that it lacks.

    Raises  CheckpointError where a policy is "error", ConfigError if a policy does not exist.
    """
    for policy, right in ((on_new, ("error", "prior", "mean")), (on_removed, ("error", "drop"))):
        if policy not in right:
            name = "on_new" if "mean" in right else "on_removed"
            raise ConfigError(f"{name}: expected {' or '.join(right)}, got {policy!r}")
    known = set(sources)
    removed = [name for name in have if name not in known]
    new = [name for name in sources if name not in have]
    if removed and on_removed == "error":
        raise CheckpointError(
            f"the state has source {removed[0]!r} that this run has not{nearest(removed[0], sources)}"
            f' (have: {", ".join(sources[:20])}); on_removed="drop" forgets it'
        )
    if new and on_new == "error":
        raise CheckpointError(
            f"this run has source {new[0]!r} that the state does not know{nearest(new[0], have)};"
            ' on_new="prior" starts it at its prior share, on_new="mean" at the mean of the others'
        )
    return [i for i, name in enumerate(sources) if name in have], new


def column(
    fresh: NDArray[Any],
    name: str,
    sources: Sequence[str],
    rows: Mapping[str, Any],
    kept: list[int],
    on_new: str,
) -> NDArray[Any]:
    """One attribute of every source: loaded where the state has it, else as `on_new` says."""
    if not kept:
        return fresh
    loaded = np.array([rows[sources[i]][name] for i in kept], dtype=fresh.dtype)
    if not np.isfinite(loaded).all():
        raise ValueError(
            f"{name} of {sources[kept[int(np.argmin(np.isfinite(loaded).reshape(len(kept), -1).all(1)))]]}"
        )
    if len(kept) == len(sources):
        return loaded
    shape = (len(sources), *loaded.shape[1:])
    out = np.empty(shape, fresh.dtype)
    out[:] = loaded.mean(axis=0) if on_new == "mean" or fresh.shape != shape else fresh
    out[kept] = loaded
    return out
