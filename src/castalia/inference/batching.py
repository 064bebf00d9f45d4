"""Continuous batching: rows enter and leave the slots of an engine between steps, each with its own sampling.

A prompt that begins like a sequence whose keys and values still lie in a slot is not read again up to there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from castalia.inference.decoding import Row
from castalia.inference.engine import Engine
from castalia.inference.sampling import Sampling, next_tokens

PREFIX_TOKENS = 16
"""Shorter common beginnings are read again: copying them gains nothing."""


@dataclass
class Running:
    """A row in its slot."""

    row: Row
    sampling: Sampling
    generator: torch.Generator
    watch: Callable[[torch.Tensor, int], None] | None = None
    token: int = -1
    """The last token that was drawn; the engine has not read it yet."""


@dataclass
class Admission:
    """A row that asks for a slot, with how its tokens are drawn."""

    row: Row
    sampling: Sampling
    generator: torch.Generator
    watch: Callable[[torch.Tensor, int], None] | None = None
    """Called with the logits (V,), padding included, and the token drawn from them, before the row takes it."""


@dataclass
class Kept:
    """What lies in a slot: the tokens that the engine has read there, and when it was last used."""

    tokens: list[int] = field(default_factory=list)
    used: int = 0


class Batcher:
    """`slots` sequences of at most `length` tokens on one engine."""

    def __init__(self, engine: Engine, slots: int, length: int) -> None:
        self.engine, self.slots = engine, engine.slots(slots, length)
        self.running: dict[int, Running] = {}
        self.kept = [Kept() for _ in range(slots)]
        self.clock = 0
        self.prefix_tokens = 0
        """Tokens of prompts that were found in a slot and not read again."""

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self.slots.count - len(self.running)

    def admit(self, rows: Sequence[Admission]) -> list[str]:
        """Read the prompts of new rows, at most `free` of them, in one step; returns the first certain text of each.

        A row that ends at once leaves its slot again.
        """
        assert len(rows) <= self.free
        slots, rest = [], []
        for new in rows:
            slot, known = self.place(new.row.ids)
            self.running[slot] = Running(new.row, new.sampling, new.generator, new.watch)
            self.kept[slot] = Kept([], self.clock)  # nothing to copy from before it is read
            slots.append(slot)
            rest.append(new.row.ids[known:])
        logits = self.slots.feed(slots, rest)
        for slot, new in zip(slots, rows, strict=True):
            self.kept[slot].tokens = list(new.row.ids)
        return self.draw(slots, logits)

    def place(self, ids: Sequence[int]) -> tuple[int, int]:
        """The free slot that was used longest ago, and how many tokens of the prompt lie there now; one is left."""
        self.clock += 1
        common = [min(shared(kept.tokens, ids), len(ids) - 1) for kept in self.kept]
        best = max(range(len(common)), key=lambda slot: common[slot])
        slot = min(
            (s for s in range(len(common)) if s not in self.running),
            key=lambda s: self.kept[s].used,
        )
        known = common[best] if common[best] >= PREFIX_TOKENS else 0
        self.slots.copy(best if known else slot, slot, known)
        self.prefix_tokens += known
        return slot, known

    def step(self) -> dict[int, str]:
        """One more token for every row; returns the new certain text by slot. Rows that end leave their slots."""
        slots = list(self.running)
        if not slots:
            return {}
        tokens = [[self.running[slot].token] for slot in slots]
        logits = self.slots.feed(slots, tokens)
        for slot, ids in zip(slots, tokens, strict=True):  # only now do they lie there
            self.kept[slot].tokens += ids
        return dict(zip(slots, self.draw(slots, logits), strict=True))

    def draw(self, slots: Sequence[int], logits: torch.Tensor) -> list[str]:
        """Draw a token for each slot out of logits (len(slots), V), and give it to its row."""
        whole, logits = logits, logits[:, : self.engine.config.vocab_size]
        running = [self.running[slot] for slot in slots]
        if all(one.sampling == running[0].sampling for one in running):
            tokens = next_tokens(
                logits, running[0].sampling, [one.generator for one in running]
            ).tolist()
        else:
            tokens = [
                int(next_tokens(row[None], one.sampling, [one.generator]))
                for row, one in zip(logits, running, strict=True)
            ]
        pieces = []
        for place, (slot, one, token) in enumerate(zip(slots, running, tokens, strict=True)):
            if one.watch is not None:
                one.watch(whole[place], token)
            one.token = token
            pieces.append(one.row.push(token))
            if one.row.finish_reason is not None:
                self.evict(slot)
        return pieces

    def evict(self, slot: int) -> None:
        """Take a row out, finished or not; what the engine read of it stays until the slot is used again."""
        row = self.running.pop(slot).row
        row.seconds = time.perf_counter() - row.started


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def decode_rows(engine: Engine, rows: Sequence[Row], sampling: Sampling) -> Iterator[list[str]]:
    """Continue all rows until each has a finish reason; yield the new text of each row after every token.

    Rows that are finished yield empty text.
    """
    batcher = Batcher(engine, len(rows), max(len(row.ids) + row.budget for row in rows))
    generators = sampling.generators(len(rows), torch.device(engine.device))
    new = [
        Admission(row, sampling, generator) for row, generator in zip(rows, generators, strict=True)
    ]
    yield batcher.admit(new)
    while batcher.running:
        pieces = batcher.step()
        yield [pieces.get(slot, "") for slot in range(len(rows))]
