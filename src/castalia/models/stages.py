"""How layers are divided among pipeline stages. Needs no torch: configs are checked with it."""

from typing import NamedTuple


class LayerSpan(NamedTuple):
    """The layers of one pipeline stage. The first also embeds; the last has final norm and head."""

    layers: range
    first: bool
    last: bool


def split(num_layers: int, count: int) -> list[LayerSpan]:
    """`count` stages of `num_layers` layers, in order, whose sizes differ by one layer at most."""
    each, extra = divmod(num_layers, count)
    stages = []
    start = 0
    for number in range(count):
        # The earlier stages take the remainder: the last one runs the head, which costs as much as
        # some layers.
        end = start + each + (number < extra)
        stages.append(LayerSpan(range(start, end), number == 0, number == count - 1))
        start = end
    return stages
