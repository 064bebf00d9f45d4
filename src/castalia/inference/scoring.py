"""Log-likelihoods of continuations: many lines through an engine at once.

The head, the largest product of a small model, is computed only where a token of a continuation is
predicted. Lines of similar length share a batch, and a line that comes twice is computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.engine import Engine, ScoringModel
from castalia.inference.torch_engine import device_of, padded
from castalia.models.config import ModelConfig, TransformerConfig
from castalia.models.tiles import logits_rows


class Line(NamedTuple):
    """A continuation to score, and the tokens before it; both have at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """What a model gives a continuation after its context."""

    logprob: float
    """Nats, summed over the continuation's tokens."""
    greedy: bool
    """Whether each token of the continuation has the largest logit; of equal ones the first."""


class Totals:
    """Sums over the tokens of each of `count` lines."""

    def __init__(self, count: int) -> None:
        self.logprobs = torch.zeros(count, dtype=torch.float64)
        self.misses = torch.zeros(count, dtype=torch.int64)

    def add(self, lines: Tensor, logprobs: Tensor, hits: Tensor) -> None:
        """Add tokens: the line of each, its log-probability and whether it is the greedy choice."""
        # Summed in float64: a window of 2048 tokens loses digits in float32.
        self.logprobs.index_add_(0, lines, logprobs.double().cpu())
        self.misses.index_add_(0, lines, (~hits).long().cpu())

    def likelihoods(self) -> list[Likelihood]:
        """The result of each line."""
        greedy = (self.misses == 0).tolist()
        return [Likelihood(*pair) for pair in zip(self.logprobs.tolist(), greedy, strict=True)]


def score_lines(
    engine: Engine,
    lines: Sequence[Line],
    *,
    rows: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of each line's continuation, in the order of `lines`.

    The softmax is over the padded vocabulary, as in training, and in float32.

    Takes   rows: lines in a batch. progress: called after each batch with the number of lines done
            since the last call.
    Raises  ConfigError if a context or continuation is empty, a line has more tokens than the
            model reads and predicts, or an id is outside the vocabulary.
    """
    if rows < 1:
        raise ConfigError(f"rows must be >= 1, got {rows}")
    lines = [Line(tuple(context), tuple(continuation)) for context, continuation in lines]
    require_lines(engine.config, lines)
    # In the order of their first occurrence; a dictionary keeps it.
    numbers = {line: number for number, line in enumerate(dict.fromkeys(lines))}
    totals = Totals(len(numbers))
    counts = [0] * len(numbers)
    for line in lines:
        counts[numbers[line]] += 1
    for done in score_unique(engine, list(numbers), rows, totals):
        if progress is not None:
            progress(sum(counts[number] for number in done))
    scored = totals.likelihoods()
    return [scored[numbers[line]] for line in lines]


def require_lines(config: ModelConfig, lines: Sequence[Line]) -> None:
    """Raises  ConfigError for the first line that cannot be scored; see `score_lines`."""
    # The last token is predicted, and never read.
    limit = config.max_position_embeddings + 1
    for number, (context, continuation) in enumerate(lines):
        size = len(context) + len(continuation)
        if not context or not continuation:
            part = "continuation" if context else "context"
            raise ConfigError(
                f"line {number} has an empty {part}; both need a token, and a text without a"
                " context can follow the token that ends a document"
            )
        if size > limit:
            raise ConfigError(
                f"line {number} has {size} tokens, of which the model scores at most {limit}; cut"
                " the context from the left, or the text into windows"
            )
        for token in (*context, *continuation):
            if not 0 <= token < config.vocab_size:
                raise ConfigError(
                    f"line {number}: id {token} is outside the vocabulary of {config.vocab_size}"
                    " tokens"
                )


def score_unique(
    engine: Engine, lines: Sequence[Line], rows: int, totals: Totals
) -> Iterator[Sequence[int]]:
    """Add the tokens of all lines to `totals`; yields the numbers of lines that are done."""
    model = engine.scoring_model()
    # Long first: what does not fit in memory fails at once.
    order = sorted(range(len(lines)), key=lambda number: (-size_of(lines[number]), number))
    if model is None:
        for number in order:
            score_alone(engine, lines[number], number, totals)
            yield [number]
        return
    if depends_on_length(engine.config):
        rows = 1
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        score_batch(model, [lines[number] for number in batch], batch, totals)
        yield batch


def size_of(line: Line) -> int:
    """Tokens of a line."""
    return len(line.context) + len(line.continuation)


def depends_on_length(config: ModelConfig) -> bool:
    """Whether the logits of a token depend on how many follow it, padding included."""
    if not isinstance(config, TransformerConfig) or config.rope_scaling is None:
        return False
    return config.rope_scaling.kind == "dynamic"


@torch.inference_mode()
def score_batch(
    model: ScoringModel, lines: Sequence[Line], numbers: Sequence[int], totals: Totals
) -> None:
    """One pass over lines of similar length, padded on the right, where no token looks."""
    device = device_of(model.decoder)
    feeds = [(*line.context, *line.continuation[:-1]) for line in lines]
    hidden = model.decoder(padded(feeds).to(device))
    places: list[tuple[int, int]] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (line, number) in enumerate(zip(lines, numbers, strict=True)):
        first = len(line.context) - 1
        places += [(row, first + i) for i in range(len(line.continuation))]
        targets += line.continuation
        owners += [number] * len(line.continuation)
    at = torch.tensor(places, device=device)
    labels = torch.tensor(targets, device=device)
    lines_of = torch.tensor(owners)
    picked = hidden[at[:, 0], at[:, 1]]
    config = model.decoder.config
    size = logits_rows(config.padded_vocab_size, config.hidden_size, 4, device.type)
    for start in range(0, len(picked), size):
        part = slice(start, start + size)
        logits = model.decoder.head(picked[part])
        totals.add(lines_of[part], *judged(logits, labels[part]))


def score_alone(engine: Engine, line: Line, number: int, totals: Totals) -> None:
    """One line through an engine that computes all logits of a text."""
    feed = [*line.context, *line.continuation[:-1]]
    labels = torch.tensor([*line.context[1:], *line.continuation])
    first = len(line.context) - 1
    at = 0
    for logits in engine.logits_in_parts(feed):
        skipped = min(max(0, first - at), len(logits))
        wanted = labels[at + skipped : at + len(logits)].to(logits.device)
        at += len(logits)
        if len(wanted):
            owners = torch.full((len(wanted),), number)
            totals.add(owners, *judged(logits[skipped:], wanted))


def judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of one label a row in nats, and whether it is the row's first maximum.

    Shapes  logits (rows, V), labels (rows,) int64 -> (rows,) float32, (rows,) bool.
    """
    logprobs = torch.log_softmax(logits, 1, dtype=torch.float32)
    return logprobs.gather(1, labels[:, None])[:, 0], logits.argmax(1) == labels
