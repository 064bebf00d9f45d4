"""The parts of a step by name, for whoever times or records them.

with part("forward"):
    ...

Without a listener a part costs a look at an empty tuple. Parts nest. They are marked outside of
what torch.compile traces.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

DATA = "data"
"""Waiting for the rows of the step."""
FORWARD = "forward"
"""Forward pass of a micro-batch, its loss included."""
LOSS = "loss"
"""The loss of a micro-batch, with the head, whose gradients it computes at once."""
HEAD = "head"
"""Products of hidden states and the head's matrix, chunk by chunk."""
BACKWARD = "backward"
"""Backward pass of a micro-batch."""
NORM = "gradient norm"
"""Norm of all gradients, which waits for the device."""
UPDATE = "update"
"""The optimizers' update."""
COLLECTIVES = "collectives"
"""What ranks sum or agree on outside of FSDP's own gathers, which torch names `FSDP::...`."""

Listener = Callable[[str], AbstractContextManager[Any]]
"""Name of a part -> what is entered and left with it."""

OFF = nullcontext()
listeners: tuple[Listener, ...] = ()
"""Those who listen now; replaced as a whole, so that another thread sees all of them or none."""


def part(name: str) -> AbstractContextManager[Any]:
    """The context of one part of a step."""
    if not listeners:
        return OFF
    return told(listeners, name)


@contextmanager
def told(now: tuple[Listener, ...], name: str) -> Iterator[None]:
    """Every listener's context around the part, the first one outermost."""
    with ExitStack() as stack:
        for listener in now:
            stack.enter_context(listener(name))
        yield


def listen(listener: Listener) -> None:
    """Tell `listener` of the parts from now on."""
    global listeners
    listeners = (*listeners, listener)


def unlisten(listener: Listener) -> None:
    """Tell it no more; parts that it has entered are left as usual."""
    global listeners
    listeners = tuple(each for each in listeners if each != listener)
