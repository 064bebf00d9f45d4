"""A mixer's state as JSON values, keyed by source name."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import CheckpointError, ConfigError, nearest


class HasState(Protocol):
    """A mixer as its state sees it: `per_source` and `scalars` name the attributes to save."""

    kind: str
    sources: tuple[str, ...]
    per_source: tuple[str, ...]
    scalars: tuple[str, ...]
    step: int
    inner: list[Any]


def write_state(mixer: HasState) -> dict[str, Any]:
    """The state of a mixer.

    `{"kind", "step", "scalars": {name: number}, "sources": {source: {attribute: value}},
    "inner": [state]}`
    """
    columns = {name: getattr(mixer, name).tolist() for name in mixer.per_source}
    rows: dict[str, dict[str, Any]] = {}
    for i, source in enumerate(mixer.sources):
        rows[source] = {name: column[i] for name, column in columns.items()}
    scalars = {name: getattr(mixer, name) for name in mixer.scalars}
    inner = [wrapped.state_dict() for wrapped in mixer.inner]
    return {
        "kind": mixer.kind,
        "step": mixer.step,
        "scalars": scalars,
        "sources": rows,
        "inner": inner,
    }


def read_state(mixer: HasState, state: Mapping[str, Any], *, on_new: str, on_removed: str) -> bool:
    """Set the attributes of `mixer` from a state; return whether the sources differ.

    Raises  CheckpointError if the sources differ and no policy allows it, or the state is damaged.
    """
    try:
        rows = state["sources"]
        step = int(state["step"])
        kept, new = compare(mixer.sources, rows, on_new=on_new, on_removed=on_removed)
        for name in mixer.per_source:
            initial = getattr(mixer, name)
            setattr(mixer, name, load_column(initial, name, mixer.sources, rows, kept, on_new))
        for name in mixer.scalars:
            # JSON does not keep int, float and bool apart; the initial value's type does.
            kind = type(getattr(mixer, name))
            setattr(mixer, name, kind(state["scalars"][name]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the state of mixer {mixer.kind!r} is damaged: {error!r}") from None
    mixer.step = step
    return bool(new) or len(kept) < len(rows)


def compare(
    sources: Sequence[str], have: Mapping[str, Any], *, on_new: str, on_removed: str
) -> tuple[list[int], list[str]]:
    """Compare a run's sources with those of a state.

    Returns  places of the sources that the state has, and names of those that it lacks.
    Raises   CheckpointError if they differ where the policy is "error"; ConfigError for an unknown
             policy.
    """
    check_policy("on_new", on_new, ("error", "prior", "mean"))
    check_policy("on_removed", on_removed, ("error", "drop"))
    known = set(sources)
    removed = [name for name in have if name not in known]
    new = [name for name in sources if name not in have]
    if removed and on_removed == "error":
        raise CheckpointError(
            f"the state has source {removed[0]!r}, which this run lacks"
            f"{nearest(removed[0], sources)} (this run has {', '.join(sources[:20])});"
            ' on_removed="drop" drops it'
        )
    if new and on_new == "error":
        raise CheckpointError(
            f"this run has source {new[0]!r}, which the state lacks{nearest(new[0], have)};"
            ' on_new="prior" starts it at its prior share, on_new="mean" at the mean of the others'
        )
    return [i for i, name in enumerate(sources) if name in have], new


def check_policy(name: str, policy: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError for an unknown policy."""
    if policy not in allowed:
        raise ConfigError(f"{name}: expected {' or '.join(allowed)}, got {policy!r}")


def load_column(
    initial: NDArray[Any],
    name: str,
    sources: Sequence[str],
    rows: Mapping[str, Any],
    kept: list[int],
    on_new: str,
) -> NDArray[Any]:
    """One attribute of all sources: from the state, and for new sources according to `on_new`.

    Shapes  initial (K, ...), the attribute before loading -> (K, ...) as the state has it.
    Raises  ValueError if the state holds NaN or infinity; KeyError if it lacks the attribute.
    """
    if not kept:
        return initial
    loaded = np.array([rows[sources[i]][name] for i in kept], dtype=initial.dtype)
    finite = np.isfinite(loaded).reshape(len(kept), -1).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} of {sources[kept[int(np.argmin(finite))]]}")
    if len(kept) == len(sources):
        return loaded
    shape = (len(sources), *loaded.shape[1:])
    out = np.empty(shape, initial.dtype)
    # An attribute that grows (ado's bins) has no initial value of the loaded shape.
    if on_new == "mean" or initial.shape != shape:
        out[:] = loaded.mean(axis=0)
    else:
        out[:] = initial
    out[kept] = loaded
    return out
