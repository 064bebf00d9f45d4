"""What happens when a source was read through."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.mixing.permutation import Places, resample

ENDLESS = np.iinfo(np.int64).max // 2
MANY_EPOCHS = 4
"""Passes over a source after which repeating it is told: more of them are worth ever less (Muennighoff et al. 2023)."""


class ExhaustionError(DataError):
    """The sources may not give another whole batch: the planned end of a run whose sources stop or are dropped."""


def rows_allowed(policy: str, size: int, name: str) -> int:
    """Rows that a source of `size` rows may give in all under a policy.

    Raises  ConfigError if there is no such policy.
    """
    if policy == "repeat":
        return ENDLESS if size else 0
    if policy in ("stop", "drop"):
        return size
    found = re.fullmatch(r"cap:([1-9]\d*)", policy)
    if not found:
        raise ConfigError(
            f"exhaustion of source {name!r}: expected repeat, stop, drop or cap:N epochs, got {policy!r}"
        )
    return size * int(found[1])


class Limits:
    """How many rows each source may give, and what was said about it."""

    def __init__(
        self, sources: Sequence[str], sizes: Places, exhaustion: str | Mapping[str, str]
    ) -> None:
        if not isinstance(exhaustion, str | Mapping):
            raise ConfigError(
                f"exhaustion: expected a policy, or policies by source, got {exhaustion!r}"
            )
        policies = {} if isinstance(exhaustion, str) else dict(exhaustion)
        unknown = [name for name in policies if name not in sources]
        if unknown:
            hint = nearest(unknown[0], sources)
            raise ConfigError(
                f"exhaustion: no source {unknown[0]!r}; have: {', '.join(sources[:20])}{hint}"
            )
        default = exhaustion if isinstance(exhaustion, str) else "repeat"
        self.sources, self.sizes = sources, sizes
        self.policies = [policies.get(name, default) for name in sources]
        each = zip(self.policies, sizes, sources, strict=True)
        self.limits = np.array(
            [rows_allowed(policy, int(size), name) for policy, size, name in each], np.int64
        )
        self.stops = np.array([policy == "stop" for policy in self.policies])
        self.forget()

    def forget(self) -> None:
        """Nothing was said yet. `marks`: above these, a closer look is needed."""
        self.told = np.zeros(len(self.sizes), bool)
        self.marks = np.where(self.limits < ENDLESS, self.limits - 1, MANY_EPOCHS * self.sizes)

    def fit(
        self, units: Places, counts: Places, cursors: Places, rows: int, draw: int
    ) -> tuple[Places, tuple[str, ...]]:
        """The counts that the sources may give, and sentences about what a person should know.

        What does not fit goes to the other sources by their shares. Needed only above the `marks`.

        Raises  ExhaustionError if a source that stops the run is short, or no whole batch is left.
        """
        room = self.limits - cursors
        taken, asked = np.minimum(counts, room), counts
        while True:
            short = np.flatnonzero((asked > room) & self.stops)
            if len(short):
                raise ExhaustionError(
                    f"source {self.sources[short[0]]!r} was read through and its policy is to stop: {room[short[0]]} of"
                    f" its {self.sizes[short[0]]} rows are left and {asked[short[0]]} are due"
                )
            missing = rows - int(taken.sum())
            if not missing:
                return taken, self.tell(cursors + taken)
            units = np.where(taken < room, units, 0)
            if not units.any():
                raise ExhaustionError(
                    f"no source may give more: {missing} of the {rows} rows of a batch are missing"
                )
            asked = taken + resample(units, missing, draw)
            taken = np.minimum(asked, room)

    def tell(self, cursors: Places) -> tuple[str, ...]:
        """A sentence, once, about each source that reached its end or is read many times."""
        news = np.flatnonzero((cursors > self.marks) & ~self.told & (self.sizes > 0))
        self.told[news] = True
        repeats = news[self.limits[news] == ENDLESS]
        self.marks[repeats] = ENDLESS
        return tuple(self.sentence(int(i)) for i in news)

    def sentence(self, place: int) -> str:
        """What happened to a source."""
        name, policy = self.sources[place], self.policies[place]
        if policy == "repeat":
            return (
                f"source {name!r} begins its epoch {MANY_EPOCHS + 1}; more repeats teach ever less"
            )
        after = policy.removeprefix("cap:") + " epochs" if policy.startswith("cap") else "one epoch"
        return f"source {name!r} is read through after {after} and gives no more rows"
