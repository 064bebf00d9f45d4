"""A reader over the slots of any engine."""

from collections.abc import Iterator

from torch import Tensor

from castalia.inference.engine import Engine, Slots
from castalia.memorization.choices import choices_of
from castalia.memorization.reader import Choices, Ids, Reader


class SlotsReader(Reader):
    """Sequences in slots, as generation has them; the engine's own arithmetic chooses."""

    rows_at_once = 16

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.slots: Slots = engine.slots(1, 2)
        self.rewinds = self.slots.rewinds

    def open(self, count: int, length: int) -> None:
        """See `Reader`."""
        self.slots = self.engine.slots(count, length)

    def read(
        self, slots: Ids, starts: Ids, tokens: Ids, first: int, labels: Ids | None = None
    ) -> Choices:
        """See `Reader`."""
        for slot, start in zip(slots.tolist(), starts.tolist(), strict=True):
            if self.slots.lengths[slot] != start:
                self.slots.copy(slot, slot, start)
        shape = (len(slots), tokens.shape[1] - first)
        vocab_size = self.engine.config.vocab_size
        return choices_of(self.logits(slots, tokens, first), shape, vocab_size, labels)

    def logits(self, slots: Ids, tokens: Ids, first: int) -> Iterator[Tensor]:
        """Logits after tokens[:, first:], slot by slot."""
        places = slots.tolist()
        if first == tokens.shape[1] - 1:
            yield self.slots.feed(places, tokens.tolist()).clone()
            return
        for part in self.slots.feed_from(places, tokens.tolist(), [first] * len(places)):
            yield part.clone()
