"""Progress of an evaluation, in requests of the harness."""

from collections.abc import Callable

Say = Callable[[str, int], None]
"""Called with the name of a task or group, and how many of its requests were answered since the
last call."""


class Meter:
    """Counts `requests` while the lines that answer them are computed on this rank.

    A request may need several lines, and one line may answer several requests, so the part of the
    lines that is done stands for that part of the requests.
    """

    def __init__(self, report: Callable[[int], None], requests: int) -> None:
        self.report = report
        self.requests = requests
        self.reported = 0

    def over(self, lines: int) -> Callable[[int], None]:
        """A function to call with the number of lines done since the last call, of `lines`."""
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            # The last request is answered when all ranks are done, see `finish`.
            self.reach(min(self.requests - 1, self.requests * done // lines))

        return add

    def reach(self, requests: int) -> None:
        """Report the requests up to this number."""
        if requests > self.reported:
            self.report(requests - self.reported)
            self.reported = requests

    def finish(self) -> None:
        """Report the rest."""
        self.reach(self.requests)
