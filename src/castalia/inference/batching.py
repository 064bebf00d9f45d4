"""Continuous batching: texts enter and leave the slots of an engine between its steps.

A prompt that begins like a sequence whose state still lies in a slot continues from a copy of that
state. How much of it can be used depends on `Slots.rewinds`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from castalia.inference.beams import BeamSearch
from castalia.inference.decoding import Continuation
from castalia.inference.engine import Engine
from castalia.inference.prompt_scoring import score_prompts
from castalia.inference.sampling import Sampling, next_tokens
from castalia.inference.steering import Steering, steering_of
from castalia.inference.text import shared

PREFIX_TOKENS = 16
"""Shorter common beginnings are read again: copying their state costs as much."""


@dataclass
class Admission:
    """A text that asks for a slot, and how its tokens are drawn."""

    text: Continuation
    sampling: Sampling
    generator: torch.Generator
    watch: Callable[[torch.Tensor, int], None] | None = None
    """Called with the logits (V,), padding included, and the token drawn from them."""
    score: Callable[[torch.Tensor, int], None] | None = None
    """Called, part by part, with the logits (n, V) after n tokens of the prompt, and the place of
    the first of them; only where the slots have `scores_prompts`."""
    continues: bool = True
    """False ends the text behind its prompt."""
    token: int = -1
    """The last token drawn, which the engine has not read yet."""
    steering: Steering | None = field(init=False)
    error: Exception | None = None
    """What ended the text, if its steering failed: a form may turn out too large on the way."""
    takes_best: bool = field(init=False)
    """Whether the token is always that of the largest logit."""

    def __post_init__(self) -> None:
        self.steering = steering_of(self.sampling, self.text)
        self.takes_best = self.steering is None and self.sampling.temperature == 0


@dataclass
class Kept:
    """The content of a slot: the tokens that the engine has read, and the time of its last use."""

    tokens: list[int] = field(default_factory=list)
    used: int = 0


class Batcher:
    """`slots` sequences of at most `length` tokens on one engine."""

    def __init__(self, engine: Engine, slots: int, length: int) -> None:
        self.engine = engine
        self.slots = engine.slots(slots, length)
        self.running: dict[int, Admission] = {}
        """By slot."""
        self.searches: list[BeamSearch] = []
        """Beam searches; each has several slots."""
        self.taken: set[int] = set()
        """Slots of texts and searches."""
        self.kept = [Kept() for _ in range(slots)]
        self.clock = 0
        """Counts admissions; orders the slots by age."""
        self.prefix_tokens = 0
        """Prompt tokens that were copied from a slot in place of being read."""

    @property
    def free(self) -> int:
        """Slots without a text."""
        return self.slots.count - len(self.taken)

    def admit(self, news: Sequence[Admission]) -> list[str]:
        """Read the prompts of new texts in one step; return the first certain text of each.

        There are at most `free` of them. A text that ends with its first token leaves its slot.
        """
        scored = [new for new in news if new.score is not None]
        plain = [new for new in news if new.score is None]
        slots: list[int] = []
        parts = []
        for some, read in ((scored, self.read_scored), (plain, self.read_texts)):
            if not some:
                continue
            try:
                own, logits = read(some)
            except BaseException:
                self.taken.difference_update(slots)
                raise
            slots += own
            parts.append(logits)
        rows = {id(new): row for row, new in enumerate([*scored, *plain])}
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        going = [new for new in news if new.continues]
        for new in news:
            if not new.continues:
                new.text.finish_reason = "length"
                self.taken.remove(slots[rows[id(new)]])
        places = [rows[id(new)] for new in going]
        if places != list(range(len(news))):
            logits = logits[places]
        drawn = [slots[row] for row in places]
        self.running.update(zip(drawn, going, strict=True))
        found = self.draw(drawn, logits) if going else []
        pieces = dict(zip(map(id, going), found, strict=True))
        return [pieces.get(id(new), "") for new in news]

    def read_texts(self, news: Sequence[Admission]) -> tuple[list[int], torch.Tensor]:
        """The prompts of texts; see `read`."""
        return self.read([new.text.ids for new in news])

    def read_scored(self, news: Sequence[Admission]) -> tuple[list[int], torch.Tensor]:
        """Read the prompts of texts whose tokens are scored, whole and once; as `read`."""
        alike: dict[tuple[int, ...], list[Admission]] = {}
        for new in news:
            alike.setdefault(tuple(new.text.ids), []).append(new)
        prompts = list(alike)
        slots = self.oldest_free()[: len(news)]
        readers = slots[: len(prompts)]
        self.clock += 1
        for slot in slots:
            self.taken.add(slot)
            self.kept[slot] = Kept([], self.clock)
        for slot in readers:
            self.slots.clear(slot)
        texts = list(alike.values())

        def hear(row: int, logits: torch.Tensor, start: int) -> None:
            for one in texts[row]:
                assert one.score is not None
                one.score(logits, start)

        try:
            ends = score_prompts(self.slots, readers, prompts, hear)
        except BaseException:
            self.taken.difference_update(slots)
            raise
        rows = [prompts.index(tuple(new.text.ids)) for new in news]
        # Each prompt's own slot goes to the first text that has it.
        others = iter(slots[len(prompts) :])
        own: list[int] = []
        for row, ids in zip(rows, (new.text.ids for new in news), strict=True):
            slot = readers[row]
            if slot in own:
                slot = next(others)
                self.slots.copy(readers[row], slot, len(ids))
            own.append(slot)
            self.kept[slot].tokens = list(ids)
        return own, torch.stack(ends)[rows]

    def admit_searches(self, news: Sequence[BeamSearch]) -> None:
        """Read the prompts of new searches in one step; there are slots free for all beams."""
        slots, logits = self.read([new.text.ids for new in news])
        for new, slot, row in zip(news, slots, logits, strict=True):
            others = self.oldest_free()[: new.search.num_beams - 1]
            self.taken.update(others)
            self.searches.append(new)
            new.begin([slot, *others])
            self.advance(new, row[None])

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        """Read prompts into free slots in one step: their slots, and logits (prompts, V) after
        them.

        A prompt that comes several times, as for several texts, is read once and copied.
        """
        assert len(prompts) <= self.free
        slots: list[int] = []
        readers: list[int] = []
        unread: list[Sequence[int]] = []
        # By prompt, the place in `readers` of the slot that reads it.
        rows: list[int] = []
        known_rows: dict[tuple[int, ...], int] = {}
        for ids in prompts:
            row = known_rows.get(tuple(ids))
            if row is None or len(ids) < PREFIX_TOKENS:
                slot, known = self.place(ids)
                row = known_rows[tuple(ids)] = len(readers)
                readers.append(slot)
                unread.append(ids[known:])
            else:
                slot = self.oldest_free()[0]
                self.prefix_tokens += len(ids)
            self.taken.add(slot)
            # Until the prompt is read, the next texts of this call must not copy from here.
            self.kept[slot] = Kept([], self.clock)
            slots.append(slot)
            rows.append(row)
        try:
            logits = self.slots.feed(readers, unread)
        except BaseException:
            self.taken.difference_update(slots)
            raise
        for slot, row, ids in zip(slots, rows, prompts, strict=True):
            if slot != readers[row]:
                self.slots.copy(readers[row], slot, len(ids))
            self.kept[slot].tokens = list(ids)
        if len(readers) < len(slots):
            logits = logits[rows]
        return slots, logits

    def oldest_free(self) -> list[int]:
        """The free slots, the one given out longest ago first."""
        free = [slot for slot in range(self.slots.count) if slot not in self.taken]
        return sorted(free, key=lambda slot: self.kept[slot].used)

    def place(self, ids: Sequence[int]) -> tuple[int, int]:
        """A free slot for a prompt, and how many of its tokens the slot holds now.

        The slot given out longest ago is taken: its sequence is the least likely to be continued.
        At least one token is left to read, because its logits are what the first token is drawn
        from.
        """
        self.clock += 1
        common = [self.usable(kept.tokens, ids) for kept in self.kept]
        best = max(range(len(common)), key=lambda slot: common[slot])
        # A running slot may be copied from, but not given out.
        slot = self.oldest_free()[0]
        if common[best] < PREFIX_TOKENS:
            self.slots.clear(slot)
            return slot, 0
        self.slots.copy(best, slot, common[best])
        self.prefix_tokens += common[best]
        return slot, common[best]

    def usable(self, kept: Sequence[int], ids: Sequence[int]) -> int:
        """How many tokens of a kept sequence a prompt can start from.

        A state that rewinds is cut back to the common beginning. One that does not is used whole
        or not at all.
        """
        common = min(shared(kept, ids), len(ids) - 1)
        if self.slots.rewinds or common == len(kept):
            return common
        return 0

    def step(self) -> dict[int, str]:
        """One more token for every text and every beam; the new certain text by slot.

        Texts and searches that end leave their slots.
        """
        slots = list(self.running)
        tokens = [[self.running[slot].token] for slot in slots]
        texts = len(slots)
        for search in self.searches:
            slots += [beam.slot for beam in search.beams]
            tokens += [[beam.token] for beam in search.beams]
        if not slots:
            return {}
        logits = self.slots.feed(slots, tokens)
        # Only after the feed: had it failed, the slots would not hold these tokens.
        for slot, ids in zip(slots, tokens, strict=True):
            self.kept[slot].tokens += ids
        row = texts
        for search in list(self.searches):
            rows = logits[row : row + len(search.beams)]
            row += len(rows)
            self.advance(search, rows)
        if not texts:
            return {}
        best = None if self.slots.best is None else self.slots.best[:texts]
        pieces = self.draw(slots[:texts], logits[:texts], best)
        return dict(zip(slots[:texts], pieces, strict=True))

    def advance(self, search: BeamSearch, logits: torch.Tensor) -> None:
        """Continue a search with logits (beams, V); one that is done leaves its slots."""
        try:
            copies = search.advance(logits, self.engine.config.vocab_size)
        except Exception as error:  # whatever it is, the other texts of the batch go on
            search.error = error
        if search.done:
            self.drop_search(search)
            return
        for origin, target in copies:
            tokens = self.kept[origin].tokens
            # The whole state, so that engines whose state cannot be cut back search as well.
            self.slots.copy(origin, target, len(tokens))
            self.kept[target] = Kept(list(tokens), self.kept[origin].used)

    def drop_search(self, search: BeamSearch) -> None:
        """Remove a search, done or not."""
        self.searches.remove(search)
        self.taken.difference_update(search.slots)

    def draw(
        self, slots: Sequence[int], logits: torch.Tensor, best: list[int] | None = None
    ) -> list[str]:
        """Draw a token for each slot out of logits (len(slots), V), and give it to its text.

        Takes   best: the tokens of the largest logits, if they are known.
        """
        running = [self.running[slot] for slot in slots]
        if best is not None and all(one.takes_best for one in running):
            tokens = best
        else:
            real = logits[:, : self.engine.config.vocab_size]
            tokens = draw_tokens(steered(real, running), running)
        pieces = []
        # `watch` gets the padding too: its softmax runs over all columns, as in training.
        for row, (slot, one, token) in enumerate(zip(slots, running, tokens, strict=True)):
            if one.error is not None:
                pieces.append(one.text.finish("length"))
                self.evict(slot)
                continue
            if one.watch is not None:
                one.watch(logits[row], token)
            one.token = token
            pieces.append(one.text.push(token))
            if one.text.finish_reason is not None:
                self.evict(slot)
        return pieces

    def evict(self, slot: int) -> None:
        """Remove a text, finished or not; its state stays for prompts that begin alike."""
        text = self.running.pop(slot).text
        self.taken.remove(slot)
        text.seconds = time.perf_counter() - text.started


def steered(logits: torch.Tensor, running: Sequence[Admission]) -> torch.Tensor:
    """Logits (rows, vocabulary) with the changes of each text.

    A text whose steering fails keeps its logits and gets the `error`: it ends alone.
    """
    if all(one.steering is None for one in running):
        return logits
    rows = []
    for row, one in zip(logits, running, strict=True):
        if one.steering is not None:
            try:
                row = one.steering(row, one.text.tokens)
            except Exception as error:  # whatever it is, the other texts of the batch go on
                one.error = error
        rows.append(row)
    return torch.stack(rows)


def draw_tokens(logits: torch.Tensor, running: Sequence[Admission]) -> list[int]:
    """One token for each row of logits (rows, vocabulary)."""
    sampling = running[0].sampling
    # One call for all rows: temperature and filters then run once over the whole batch.
    if all(one.sampling == sampling for one in running):
        tokens: list[int] = next_tokens(
            logits, sampling, [one.generator for one in running]
        ).tolist()
        return tokens
    return [
        int(next_tokens(row[None], one.sampling, [one.generator]))
        for row, one in zip(logits, running, strict=True)
    ]


def raise_first(admissions: Sequence[Admission]) -> None:
    """Raise the error of the first text that has one."""
    for one in admissions:
        if one.error is not None:
            raise one.error
