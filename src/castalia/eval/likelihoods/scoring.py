"""Log-likelihoods of continuations: many lines through an engine at once.

The head, the largest product of a small model, is computed only where a token of a continuation is
predicted. What lines have in common is read once (prefixes.py), and lines of similar length share
a pass (readers.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.eval.likelihoods.prefixes import Group, Section, Span, sections_of, separate
from castalia.eval.likelihoods.readers import Predicted, Reader, Rows, Wanted, reader_of
from castalia.inference.engine import Engine
from castalia.models.model_config import ModelConfig

BLOCK = 128
"""Logits whose maximum is taken together; the vocabulary is padded to a multiple of it."""


class Line(NamedTuple):
    """A continuation to score, and the tokens before it; both have at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """What a model gives a continuation after its context."""

    logprob: float
    """Nats, summed over the continuation's tokens."""
    greedy: bool
    """Whether each token of the continuation is the likeliest; of equal ones the first."""


def score_lines(
    engine: Engine,
    lines: Sequence[Line],
    *,
    rows: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of each line's continuation, in the order of `lines`.

    The softmax is over the padded vocabulary, as in training, and in float32.

    Takes   rows: lines in a batch, of which short ones share a pass in larger numbers.
            progress: called after each batch with the number of lines done since the last call.
    Raises  ConfigError if a context or continuation is empty, a line has more tokens than the
            model reads and predicts, or an id is outside the vocabulary.
    """
    if rows < 1:
        raise ConfigError(f"rows must be >= 1, got {rows}")
    lines = [Line(tuple(context), tuple(continuation)) for context, continuation in lines]
    require_lines(engine.config, lines)
    # In the order of their first occurrence; a dictionary keeps it.
    numbers = {line: number for number, line in enumerate(dict.fromkeys(lines))}
    counts = [0] * len(numbers)
    for line in lines:
        counts[numbers[line]] += 1
    scoring = Scoring(reader_of(engine), list(numbers), rows)
    for done in scoring.run():
        if progress is not None and done:
            progress(sum(counts[number] for number in done))
    scored = scoring.likelihoods()
    return [scored[numbers[line]] for line in lines]


def require_lines(config: ModelConfig, lines: Sequence[Line]) -> None:
    """Raises  ConfigError for the first line that cannot be scored; see `score_lines`."""
    # The last token is predicted, and never read.
    limit = config.max_position_embeddings + 1
    for number, (context, continuation) in enumerate(lines):
        size = len(context) + len(continuation)
        if not context or not continuation:
            part = "context"
            if context:
                part = "continuation"
            raise ConfigError(
                f"line {number} has an empty {part}; both need a token, and a text without a"
                " context can follow the token that ends a document"
            )
        if size > limit:
            raise ConfigError(
                f"line {number} has {size} tokens, of which the model scores at most {limit}; cut"
                " the context from the left, or the text into windows"
            )
        for part_of_line in (context, continuation):
            low = min(part_of_line)
            high = max(part_of_line)
            if low < 0 or high >= config.vocab_size:
                raise ConfigError(
                    f"line {number}: id {low if low < 0 else high} is outside the vocabulary of"
                    f" {config.vocab_size} tokens"
                )


class Scoring:
    """The lines of one call, their plan, and sums over the tokens of each."""

    def __init__(self, reader: Reader, lines: Sequence[Line], rows: int) -> None:
        self.reader = reader
        self.lines = lines
        self.rows = rows
        # The last token predicts nothing that is in a line.
        self.inputs = [line.context + line.continuation[:-1] for line in lines]
        self.logprobs = torch.zeros(len(lines), dtype=torch.float64)
        self.misses = torch.zeros(len(lines), dtype=torch.int64)

    def likelihoods(self) -> list[Likelihood]:
        """The result of each line."""
        greedy = (self.misses == 0).tolist()
        return [Likelihood(*pair) for pair in zip(self.logprobs.tolist(), greedy, strict=True)]

    def run(self) -> Iterator[Sequence[int]]:
        """Read all lines; yields the numbers of those that are done since the last time."""
        if self.reader.copies:
            sections = sections_of(self.inputs, self.rows)
        else:
            sections = separate(self.inputs)
        for section in sections:
            yield from self.read_section(section)

    def read_section(self, section: Section) -> Iterator[Sequence[int]]:
        """A header, and the groups after it."""
        header, groups = section
        batches = list(self.batches(groups))
        length = max((padded_length(batch) for batch in batches), default=header.end)
        rows = max((len(batch) for batch in batches), default=1)
        ids: tuple[int, ...] = ()
        if header.lines:
            ids = self.inputs[header.lines[0]][: header.end]
        wanted = self.wanted([header] if ids else [])
        self.add(self.reader.header(ids, wanted, rows, length), wanted)
        yield [line for line in header.lines if len(self.inputs[line]) == header.end]
        for batch in batches:
            yield self.read_batch(batch)

    def batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups with stems of similar length, as many as a pass has room for."""
        # Long first: what does not fit in memory fails at once.
        order = sorted(groups, key=lambda group: (group.stem.start - group.stem.end, group.stem))
        at = 0
        while at < len(order):
            some = order[at : at + self.fitting(order, at)]
            at += len(some)
            # The rows whose branches are read are the first ones.
            yield sorted(some, key=lambda group: -len(group.branches))

    def fitting(self, order: Sequence[Group], at: int) -> int:
        """How many groups from place `at` on, at least one, a pass has room for."""
        first = order[at].stem
        most = len(order) - at
        if self.reader.at_most_rows or first.start:
            most = min(most, self.rows)
        longest = first.end - first.start
        for count in range(most):
            group = order[at + count]
            # The branches of all rows share a pass, too.
            longest = max(longest, longest_branch(group))
            is_full = (count + 1) * longest > self.rows * self.reader.row_tokens
            differs = self.reader.one_length and group.stem.end != first.end
            if count and (is_full or differs):
                return count
        return most

    def read_batch(self, batch: Sequence[Group]) -> Sequence[int]:
        """Stems in one pass, then a branch of each, until there are none; returns the lines."""
        stems = [group.stem for group in batch]
        wanted = self.wanted(stems)
        room = max(longest_branch(group) for group in batch)
        self.add(self.reader.stems(self.tokens(stems), wanted, room), wanted)
        for number in range(len(batch[0].branches)):
            spans = [group.branches[number] for group in batch if number < len(group.branches)]
            wanted = self.wanted(spans)
            self.add(self.reader.branches(self.tokens(spans), wanted), wanted)
        return [line for stem in stems for line in stem.lines]

    def tokens(self, spans: Sequence[Span]) -> Rows:
        """The tokens of some spans."""
        return [self.inputs[span.lines[0]][span.start : span.end] for span in spans]

    def wanted(self, spans: Sequence[Span]) -> Wanted:
        """What the lines of some spans, the rows of one pass, ask."""
        firsts = []
        positions: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        before = 0
        for span in spans:
            # All that a line predicts lies at the end of its input.
            starts = [max(span.start, len(self.lines[i].context) - 1) for i in span.lines]
            first = span.end
            if starts:
                first = min(span.end, *starts)
            for i, start in zip(span.lines, starts, strict=True):
                if start >= span.end:
                    continue
                line = self.lines[i]
                at = start - (len(line.context) - 1)
                labels += line.continuation[at : at + span.end - start]
                positions += range(before + start - first, before + span.end - first)
                owners += [i] * (span.end - start)
            firsts.append(first - span.start)
            before += span.end - first
        order = torch.tensor(positions, dtype=torch.int64).argsort(stable=True)
        columns = [torch.tensor(part, dtype=torch.int64) for part in (positions, labels, owners)]
        return Wanted(firsts, *(column[order] for column in columns))

    @torch.inference_mode()
    def add(self, parts: Iterable[Tensor | Predicted], wanted: Wanted) -> None:
        """Add predictions to the sums of their lines; of parts that are logits (positions, V), or
        predictions already."""
        start = 0
        end = 0
        for part in parts:
            begin = end
            if isinstance(part, Predicted):
                end += len(part.logprobs)
                hits = part.likeliest == wanted.labels[begin:end]
                picked = part.logprobs
            else:
                limit = start + len(part)
                end = int(torch.searchsorted(wanted.positions, limit))
                at = (wanted.positions[begin:end] - start).to(part.device)
                start = limit
                own = wanted.labels[begin:end].to(part.device)
                logprobs = self.log_softmax(part)
                hits = likeliest(logprobs)[at] == own
                picked = logprobs[at, own]
            owners = wanted.owners[begin:end]
            # Summed in float64: a window of 2048 tokens loses digits in float32.
            self.logprobs.index_add_(0, owners, picked.double().cpu())
            self.misses.index_add_(0, owners, (~hits).long().cpu())
        assert end == len(wanted.positions), "the reader gave fewer logits than were wanted"

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities of logits (positions, V), float32."""
        if self.reader.owns_logits and logits.dtype == torch.float32 and logits.is_cpu:
            # In place: a second buffer would not fit in the cache, and takes four times as long.
            return torch.log_softmax(logits, 1, out=logits)
        return torch.log_softmax(logits, 1, dtype=torch.float32)


def padded_length(batch: Sequence[Group]) -> int:
    """Tokens of the rows of a batch, each as long as the longest stem and branch together."""
    return max(group.stem.end for group in batch) + max(map(longest_branch, batch))


def longest_branch(group: Group) -> int:
    """Tokens of the longest branch, which is the first; 0 without any."""
    if not group.branches:
        return 0
    return group.branches[0].end - group.branches[0].start


def likeliest(logprobs: Tensor) -> Tensor:
    """The first largest number of each row, (rows, V) float32 -> (rows,) int64."""
    if logprobs.shape[1] % BLOCK:
        return logprobs.argmax(1)
    # torch's argmax over long rows is not vectorized; its amax is, and five times as fast.
    blocks = logprobs.unflatten(1, (-1, BLOCK))
    block = blocks.amax(2).argmax(1)
    rows = torch.arange(len(logprobs), device=logprobs.device)
    return block * BLOCK + blocks[rows, block].argmax(1)
