"""Policies for exhausted sources: repeat, stop, drop or cap:N."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.mixing.permutation import Places, resample

ENDLESS = np.iinfo(np.int64).max // 2
"""Row limit of a repeated source; half of the range, so that adding a batch cannot overflow."""
MANY_EPOCHS = 4
"""Passes over a source after which repeats are reported. Returns diminish beyond four
(Muennighoff et al. 2023, arXiv:2305.16264)."""


class ExhaustionError(DataError):
    """The sources cannot fill another batch: the regular end of a run that stops or drops them."""


def rows_allowed(policy: str, size: int, name: str) -> int:
    """Total rows that a source of `size` rows may contribute under a policy.

    Raises  ConfigError for an unknown policy.
    """
    if policy == "repeat":
        return ENDLESS if size else 0
    if policy in ("stop", "drop"):
        return size
    match = re.fullmatch(r"cap:([1-9]\d*)", policy)
    if not match:
        raise ConfigError(
            f"exhaustion of source {name!r}: expected repeat, stop, drop or cap:N epochs,"
            f" got {policy!r}"
        )
    return size * int(match[1])


class RowLimits:
    """How many rows each source may contribute, and which of them were reported as exhausted."""

    def __init__(
        self, sources: Sequence[str], sizes: Places, exhaustion: str | Mapping[str, str]
    ) -> None:
        if not isinstance(exhaustion, str | Mapping):
            raise ConfigError(
                f"exhaustion: expected a policy, or policies by source, got {exhaustion!r}"
            )
        default = "repeat"
        policies: dict[str, str] = {}
        if isinstance(exhaustion, str):
            default = exhaustion
        else:
            policies = dict(exhaustion)
        unknown = [name for name in policies if name not in sources]
        if unknown:
            hint = nearest(unknown[0], sources)
            raise ConfigError(
                f"exhaustion: unknown source {unknown[0]!r}; choose one of"
                f" {', '.join(sources[:20])}{hint}"
            )
        self.sources = sources
        self.sizes = sizes
        self.policies = [policies.get(name, default) for name in sources]
        each = zip(self.policies, sizes, sources, strict=True)
        self.limits = np.array(
            [rows_allowed(policy, int(size), name) for policy, size, name in each], np.int64
        )
        self.stops = np.array([policy == "stop" for policy in self.policies])
        self.forget()

    def forget(self) -> None:
        """Reset what was reported.

        `marks` are the row counts above which a plan must be checked. Comparing with them is all
        that the usual step pays.
        """
        self.reported = np.zeros(len(self.sizes), bool)
        self.marks = np.where(self.limits < ENDLESS, self.limits - 1, MANY_EPOCHS * self.sizes)

    def fit(
        self, units: Places, counts: Places, cursors: Places, rows: int, draw: int
    ) -> tuple[Places, tuple[str, ...]]:
        """Limit the counts of a batch to the rows left, and report exhausted sources.

        Rows that a source lacks are drawn from the other sources in proportion to their shares.
        Only a plan above the `marks` needs this.

        Shapes   units (shares in 2**-32), counts and cursors (K,) int64
                 -> counts (K,) int64 and sentences for the log.
        Raises   ExhaustionError if a source with the policy `stop` is short, or if the sources
                 together cannot fill the batch.
        """
        room = self.limits - cursors
        asked = counts
        taken = np.minimum(counts, room)
        while True:
            short = np.flatnonzero((asked > room) & self.stops)
            if len(short):
                place = short[0]
                raise ExhaustionError(
                    f"source {self.sources[place]!r} is exhausted and its policy is to stop:"
                    f" {room[place]} of its {self.sizes[place]} rows are left and {asked[place]}"
                    " are due"
                )
            missing = rows - int(taken.sum())
            if not missing:
                return taken, self.report(cursors + taken)
            # Full sources drop out; each round either fills the batch or removes a source.
            units = np.where(taken < room, units, 0)
            if not units.any():
                raise ExhaustionError(
                    f"all sources are exhausted: {missing} of the {rows} rows of a batch are"
                    " missing"
                )
            asked = taken + resample(units, missing, draw)
            taken = np.minimum(asked, room)

    def report(self, cursors: Places) -> tuple[str, ...]:
        """One sentence for each source newly exhausted or newly read in a fifth epoch."""
        news = np.flatnonzero((cursors > self.marks) & ~self.reported & (self.sizes > 0))
        self.reported[news] = True
        # A repeated source has no limit: never check it again.
        repeats = news[self.limits[news] == ENDLESS]
        self.marks[repeats] = ENDLESS
        return tuple(self.sentence(int(i)) for i in news)

    def sentence(self, place: int) -> str:
        """The log line for an exhausted or often repeated source."""
        name = self.sources[place]
        policy = self.policies[place]
        if policy == "repeat":
            return (
                f"source {name!r} starts epoch {MANY_EPOCHS + 1}; further repeats bring"
                " diminishing returns"
            )
        after = "one epoch"
        if policy.startswith("cap"):
            after = policy.removeprefix("cap:") + " epochs"
        return f"source {name!r} is exhausted after {after} and contributes no more rows"
