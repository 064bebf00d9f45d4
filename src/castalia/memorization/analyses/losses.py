"""The loss of the continuation against the score."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BIN = 0.01
"""Nats."""
LARGEST = 25.0
"""Nats; a loss above counts as this one in quantiles, not in means."""
QUANTILES = (0.1, 0.5, 0.9)


class Losses:
    """Means and quantiles of the loss by the number of matching tokens, in little memory."""

    def __init__(self, levels: int) -> None:
        self.rows = np.zeros(levels, np.int64)
        self.finite = np.zeros(levels, np.int64)
        self.totals = np.zeros(levels)
        self.bins = np.zeros((levels, round(LARGEST / BIN) + 1), np.int64)

    def add(self, matches: NDArray[np.int64], loss: NDArray[Any]) -> None:
        """Add rows.

        Shapes  matches (R,) matching tokens; loss (R,) mean nats of a token.
        """
        levels = len(self.rows)
        self.rows += np.bincount(matches, minlength=levels)
        known = np.isfinite(loss)
        matches = matches[known]
        loss = loss[known].astype(np.float64)
        self.finite += np.bincount(matches, minlength=levels)
        self.totals += np.bincount(matches, loss, minlength=levels)
        places = np.clip(loss / BIN, 0, self.bins.shape[1] - 1).astype(np.int64)
        cells = matches * self.bins.shape[1] + places
        self.bins += np.bincount(cells, minlength=self.bins.size).reshape(self.bins.shape)

    def data(self) -> list[dict[str, Any]]:
        """A line for each score: rows, mean loss, quantiles to half a hundredth of a nat."""
        lines = []
        for matches, rows in enumerate(self.rows.tolist()):
            finite = int(self.finite[matches])
            line: dict[str, Any] = {
                "matches": matches,
                "score": matches / (len(self.rows) - 1),
                "rows": rows,
                "mean_loss": float(self.totals[matches]) / finite if finite else None,
            }
            for share in QUANTILES:
                line[f"loss_{share:.0%}".rstrip("%")] = self.quantile(matches, share)
            lines.append(line)
        return lines

    def quantile(self, matches: int, share: float) -> float | None:
        """A quantile of the loss at one score; None without rows."""
        below = np.cumsum(self.bins[matches])
        if not below[-1]:
            return None
        return (int(np.searchsorted(below, share * below[-1])) + 0.5) * BIN
