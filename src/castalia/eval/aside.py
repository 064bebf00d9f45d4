"""Work between two steps that leaves no trace in the training: its ranks, random states, weights.

An evaluation must neither disturb the run nor end it. Its errors are exchanged by the ranks, since
one that left alone would be waited for.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from castalia.adapters import AdapterConfig, NoAdapter
from castalia.adapters.adapting import adapt
from castalia.core.errors import CastaliaError
from castalia.distributed import World, is_loss
from castalia.distributed.whole import fill_whole
from castalia.models import Decoder, ModelConfig

STOPPED = "asked to stop"
LOOK_SECONDS = 0.5
"""Between two looks whether another rank broke off."""


class AbandonedError(CastaliaError):
    """Another rank has ended the common work."""


class BrokenOffError(CastaliaError):
    """A request to stop ended the work of this rank."""


@dataclass
class Peers:
    """The ranks in one piece of common work, in which the error of one reaches all.

    asked  whether this rank is asked to stop.
    """

    world: World
    asked: Callable[[], bool]
    progressed: Callable[[], None]
    name: str
    """Of this piece of work; no other one of the run has it."""
    looked: float = field(default_factory=time.monotonic)
    is_broken_off: bool = False
    """Whether a request to stop has ended the work, on whichever rank; equal on all of them after
    `together`."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order.

        Raises  AbandonedError if a rank has failed.
        """
        return self.exchange(value, None)

    def exchange(self, value: Any, error: str | None) -> list[Any]:
        """As `gather`; with an error, the last exchange of the work on every rank."""
        if self.world.size == 1:
            return [value]
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, (value, error))
        self.is_broken_off |= any(text == STOPPED for _, text in parts)
        errors = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(parts) if text]
        if errors:
            raise AbandonedError("; ".join(errors))
        return [part for part, _ in parts]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends with an error on every rank if it does on one.

        The loss of a rank is passed on as it is: nothing can be exchanged any more.
        """
        try:
            yield
            self.gather(None)
        except AbandonedError:
            raise
        except Exception as error:
            if is_loss(error):
                raise
            # The others are in an exchange, or will be: it is the one that they learn it in.
            with suppress(AbandonedError):
                self.exchange(None, in_words(error))
            raise

    def before_pass(self, *_: Any) -> None:
        """Called before each pass of the model: the limit of the watchdog starts again.

        Raises  BrokenOffError if this or another rank is asked to stop.
        """
        self.progressed()
        asked = self.asked()
        if self.world.size > 1 and (asked or time.monotonic() - self.looked > LOOK_SECONDS):
            # Not a collective: the ranks make different numbers of passes.
            self.looked = time.monotonic()
            if asked:
                store().set(self.name, STOPPED)
            asked = store().check([self.name])
        if asked:
            self.is_broken_off = True
            raise BrokenOffError(STOPPED)


def store() -> dist.Store:
    """The store that the ranks joined by."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def in_words(error: BaseException) -> str:
    """The first line of an error, with its kind where it is not one of ours."""
    lines = str(error).splitlines()
    text = ""
    if lines:
        text = lines[0]
    if isinstance(error, CastaliaError):
        return text
    return f"{type(error).__name__}: {text}"


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever the block draws or seeds, the random states after it are those before it."""
    python = random.getstate()
    numpy = np.random.get_state()
    cpu = torch.get_rng_state()
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)


def whole_model(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    world: World,
    peers: Peers,
    dtype: torch.dtype,
    adapter: AdapterConfig | None = None,
) -> Decoder:
    """The model in training as one of its own, whole on every rank.

    `weights` are those that this rank holds, without copies of another pipeline stage's.

    A second Decoder over the same weights, on one rank and in their own dtype: it is not compiled,
    for many lengths would push the training's graphs out of the cache, and its mode is its own.
    Elsewhere the weights are copies.
    """
    with torch.device("meta"):
        whole = adapt(Decoder(config), adapter or NoAdapter.Config())

    def kept(name: str, value: Tensor) -> torch.dtype:
        # The integers of a quantized base, and what they are multiplied with, stay as they are.
        is_integers = not value.is_floating_point() or name.endswith(".weight_scale")
        return value.dtype if is_integers else dtype

    if world.size == 1:
        wholes = {name: value.detach().to(kept(name, value)) for name, value in weights.items()}
    else:
        wholes = {}
        for name, shape in whole.state_dict().items():
            wholes[name] = torch.zeros(shape.shape, dtype=kept(name, shape), device=world.device)
        # Every rank has the memory: from here on none leaves the collectives alone.
        peers.gather(None)
        fill_whole(wholes, weights, world.rank)
    whole.load_state_dict(wholes, assign=True)
    whole.requires_grad_(False)
    whole.register_forward_pre_hook(peers.before_pass)
    return whole
