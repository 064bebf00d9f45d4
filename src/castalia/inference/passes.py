"""Which rows are read in one pass of a decoder: as many as pay, and no more than memory allows.

Rows of unequal lengths are padded on the right, and every token looks at as many keys as the
longest row has. A pass of its own costs a row the weights, which are read once for each pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

PASS_TOKENS = {"cpu": 1024}
"""Tokens of a pass, padding included: products run at full speed, and the activations of a long
prompt are never in memory together."""
PASS_TOKENS_DEVICE = 16384
"""The same on a GPU."""
PASS_COST = {"cpu": 32}
"""Tokens whose products take as long as reading the weights, once for each pass."""
PASS_COST_DEVICE = 1024
"""The same on a GPU."""
COPIED_KEYS = 8192
"""Keys of rows that are copied for a pass: 200 MB for a model of 70M parameters in float32."""
COPY = 40
"""Products of a query with a key that take as long as copying a key and its value."""
CALLS = 1024
"""Width of a model whose products for a token take as long as the calls that compute them."""


class NewRow(NamedTuple):
    """Tokens to be read behind those that a row has."""

    start: int
    new: int

    @property
    def end(self) -> int:
        """Tokens of the row when they are read."""
        return self.start + self.new


def pass_tokens(device: str) -> int:
    """Most tokens of a pass on a type of device."""
    return PASS_TOKENS.get(device, PASS_TOKENS_DEVICE)


def grouped(rows: Sequence[NewRow], width: int, device: str) -> list[list[int]]:
    """Rows that are read together, as places in `rows`, in ascending order.

    Takes   width: of the model's hidden states.
    A row of more tokens than a pass has is alone.
    """
    most = pass_tokens(device)
    order = sorted(range(len(rows)), key=lambda place: (rows[place].start > 0, rows[place].new))
    groups: list[list[int]] = []
    for place in order:
        if groups:
            both = [rows[i] for i in (*groups[-1], place)]
            apart = cost(both[:-1], width, device) + cost(both[-1:], width, device)
            tokens = len(both) * longest(both)
            keys = len(both) * most_keys(both)
            if tokens <= most and keys <= COPIED_KEYS and cost(both, width, device) <= apart:
                groups[-1].append(place)
                continue
        groups.append([place])
    return [sorted(group) for group in groups]


def cost(rows: Sequence[NewRow], width: int, device: str) -> int:
    """Time of one pass over rows, in products of a query with a key in one layer."""
    # A block has about 12 * width^2 weights, and a query with its key and value 2 * width numbers.
    linear = 6 * width
    keys = most_keys(rows)
    own = PASS_COST.get(device, PASS_COST_DEVICE) + (CALLS // width) ** 2
    copied = 0
    # A row alone is read where it is.
    if len(rows) > 1:
        copied = len(rows) * COPY * (keys + max(row.start for row in rows))
    return own * linear + len(rows) * longest(rows) * (linear + keys) + copied


def longest(rows: Sequence[NewRow]) -> int:
    """New tokens of each row, padding included."""
    return max(row.new for row in rows)


def most_keys(rows: Sequence[NewRow]) -> int:
    """Keys of each row, padding included."""
    return max(row.start for row in rows) + longest(rows)
