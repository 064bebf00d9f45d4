"""Where a model may be cut into pipeline stages; needs no torch, so that a config can be checked with it."""

from typing import NamedTuple


class LayerSpan(NamedTuple):
    """The layers of one pipeline stage; the first stage also embeds, the last has the final norm and the head."""

    layers: range
    first: bool
    last: bool


def split(num_layers: int, count: int) -> list[LayerSpan]:
    """`count` stages of about equal numbers of layers, in order; the earlier ones take what is left over.

    The last stage runs the head, which costs as much as some layers, so it never has more layers than another.
    """
    each, extra = divmod(num_layers, count)
    stages = []
    start = 0
    for number in range(count):
        end = start + each + (number < extra)
        stages.append(LayerSpan(range(start, end), number == 0, number == count - 1))
        start = end
    return stages
