"""What a layer costs, as a family or a kind of layer declares it. Needs no torch."""

from typing import NamedTuple, Protocol


class Stored(NamedTuple):
    """Numbers that one layer keeps of each token for the backward pass."""

    residual: int
    """The layer's input, always fp32. With full recompute nothing else is kept."""
    split: int
    """Activations in the compute dtype, of which each tp rank keeps its share."""
    gathered: int
    """Activations in the compute dtype that every tp rank keeps for all tokens."""
    again_split: int = 0
    """The part of `split` that selective recompute makes again."""
    again_gathered: int = 0
    """The part of `gathered` that selective recompute makes again."""
    keys: int = 0
    """The part of `split` that is keys and values: with fewer of their heads than tp ranks, and of
    whole rows under cp, a rank keeps more than its share."""
    unfused: int = 0
    """Numbers in fp32, split, that norms keep on a CPU, where torch has no kernel for them."""
    exact: int = 0
    """Numbers of a recurrence, split, always fp32; selective recompute makes them again."""
    heads: int = 0
    """Query heads whose attention probabilities the CPU kernel keeps: of short rows, or of few."""
    plain_heads: int = 0
    """Query heads whose attention probabilities are kept for all keys, on every device."""
    masked_heads: int = 0
    """Query heads with a bias or a mask of their own, which is kept for all keys; rows without
    documents share it."""
    trained_bias: bool = False
    """Whether that bias has a gradient: on a CPU the probabilities are then kept in fp32."""
    head_dim: int = 0
    """Width of these heads, which decides how long a short row may be."""


class Costs(NamedTuple):
    """What one layer costs; the estimates add these up over the layers."""

    parameters: int
    """All weights of the layer."""
    active: int
    """Weights that work on one token; fewer than `parameters` where experts are chosen."""
    products: int
    """Weights of the matrix products that one token goes through."""
    flops_per_key: int
    """Training FLOPs of one token for every position of its row: attention's scores and sums."""
    kept: Stored
    tp_width: int = 0
    """Numbers of each token that tp ranks gather in one forward pass, and reduce as many."""
    cp_width: int = 0
    """Numbers of each token that cp ranks gather in one forward pass: its keys and values."""
    key_heads: int | None = None
    """Heads of keys and values: ranks of tp beyond them hold copies. None if there are none."""
    key_parameters: int = 0
    """Weights of keys and values, where they are layers of their own; whole on every rank of tp
    where ranks outnumber these heads."""
    whole_parameters: int = 0
    """Weights that every rank of tp holds in full, such as norms."""
    experts: int = 0
    """The part of `parameters` that is in experts, of which ranks of parallel.ep hold some each."""
    experts_split: bool = False
    """Whether ranks of tp split each expert; otherwise each has whole ones, for its own tokens."""
    ep_width: int = 0
    """Numbers of each token that go to the ranks of its experts in one forward pass, and come
    back."""
    window: int | None = None
    """Most tokens that a token sees; None means its whole row."""

    def key_parts(self, tp: int) -> int:
        """Into how many parts tp ranks split keys and values."""
        return tp if self.key_heads is None else min(tp, self.key_heads)

    def flops(self, seq_length: int) -> int:
        """Training FLOPs of one token in rows of `seq_length` tokens.

        A multiply-add is 2 FLOPs and the backward costs twice the forward, hence 6 a weight.
        """
        # 2 forward, 2 for the gradient of the input, 2 for that of the weight.
        keys = seq_length if self.window is None else min(seq_length, self.window)
        return 6 * self.products + self.flops_per_key * keys


class Axes(Protocol):
    """The parallel degrees that a model may have to divide over."""

    @property
    def tp(self) -> int:
        """Ranks that split each matrix."""

    @property
    def pp(self) -> int:
        """Ranks that hold the layers one after the other."""
