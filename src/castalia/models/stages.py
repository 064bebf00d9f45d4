"""Where a model may be cut into stages; needs no torch, so that a config can be checked with it."""

from typing import NamedTuple


class Part(NamedTuple):
    """A run of layers of a Decoder; the first part also embeds, the last also has the final norm and the head."""

    layers: range
    first: bool
    last: bool


def split(num_layers: int, count: int) -> list[Part]:
    """`count` parts of about equal numbers of layers, in order; the earlier ones take what is left over.

    The last part runs the head, which costs as much as some layers, so it never has more layers than another.
    """
    each, extra = divmod(num_layers, count)
    starts = [number * each + min(number, extra) for number in range(count + 1)]
    return [Part(range(starts[n], starts[n + 1]), n == 0, n == count - 1) for n in range(count)]
