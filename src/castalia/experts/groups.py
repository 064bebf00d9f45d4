"""The groups of tokens that are balanced together, also where ranks share a row."""

from typing import Literal, NamedTuple

from torch import Tensor

from castalia.experts.layer import WholeRows


class Groups(NamedTuple):
    """How the tokens (B, T) that are held here lie in groups (G, S): the rows, whole on every rank
    that shares them, or all that a rank has in a pass."""

    kind: Literal["row", "pass"]
    rows: WholeRows | None
    batch: int
    length: int

    @property
    def shared(self) -> int:
        """Ranks that share a row."""
        return 1 if self.rows is None else self.rows.size

    @property
    def tokens(self) -> int:
        """Tokens of a whole row."""
        return self.length * self.shared

    def whole(self, values_BTX: Tensor) -> Tensor:
        """Values of all tokens of the groups, (B, T, X) -> (G, S, X); without a gradient."""
        if self.kind == "pass":
            return values_BTX.reshape(1, self.batch * self.length, -1)
        return values_BTX if self.rows is None else self.rows.gather(values_BTX)

    def own(self, values_GSX: Tensor) -> Tensor:
        """Those of the tokens held here, (G, S, X) -> (B, T, X)."""
        if self.kind == "pass":
            return values_GSX.reshape(self.batch, self.length, -1)
        return values_GSX if self.rows is None else self.rows.own(values_GSX)
