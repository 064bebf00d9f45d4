"""Log-likelihoods of many lines at once, against each line alone."""

from collections.abc import Sequence

import pytest
import torch
from tests.inference.test_native_families import COMPILED, config_of, native, random_model

from castalia.core.errors import ConfigError
from castalia.inference.engine import Engine
from castalia.inference.scoring import Likelihood, Line, score_lines
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder

LIMIT = 128


def line(context: Sequence[int], continuation: Sequence[int]) -> Line:
    return Line(tuple(context), tuple(continuation))


def some_lines(seed: int = 0) -> list[Line]:
    """Choices on one context, single tokens, pairs that begin alike, full length, duplicates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, 257, (count,), generator=generator).tolist()

    header = draw(30)
    lines = []
    for size in (9, 40, 17):
        context = header + draw(size)
        lines += [line(context, draw(count)) for count in (3, 1, 7, 1)]
    for size in (1, 5, 70):
        lines.append(line(draw(size), draw(4)))
    lines.append(line(draw(1), draw(LIMIT)))
    lines.append(line(draw(LIMIT), draw(1)))
    start = draw(12)
    lines += [line(start[:1], start[1:] + draw(3)), line(start[:1], start[1:] + draw(5))]
    return [*lines, lines[0], lines[5]]


def alone(engine: Engine, one: Line) -> Likelihood:
    """A line by the engine's own scoring of texts and its logits."""
    ids = [*one.context, *one.continuation]
    first = len(one.context) - 1
    logits = engine.logits(ids[:-1])[first:]
    greedy = logits.argmax(1).tolist() == list(one.continuation)
    return Likelihood(float(engine.logprobs(ids)[first:].double().sum()), greedy)


def require_equal(engine: Engine, lines: Sequence[Line], error: float = 2e-5) -> None:
    done: list[int] = []
    scored = score_lines(engine, lines, rows=4, progress=done.append)
    assert sum(done) == len(lines)
    for got, one in zip(scored, lines, strict=True):
        want = alone(engine, one)
        assert got.logprob == pytest.approx(want.logprob, rel=error, abs=error)
        assert got.greedy == want.greedy


FAMILIES = ["llama", "layers in turn", "falcon of RefinedWeb", "falcon's rounding", "gpt2", "rpe"]


@pytest.mark.parametrize("case", [*FAMILIES, "sinusoidal"])
def test_many_lines_are_scored_as_each_alone(case: str) -> None:
    require_equal(TorchEngine(random_model(config_of(case))), some_lines())


@COMPILED
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_the_native_engine_scores_in_its_own_arithmetic(storage: str) -> None:
    engine = native(random_model(config_of("mistral")), storage)
    assert engine.compiled is not None
    require_equal(engine, some_lines())


def greedy_lines(engine: Engine) -> list[Line]:
    """Lines whose continuations are greedy, and one that departs at its end."""
    ids = [5, 9, 2]
    for _ in range(6):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    other = (ids[-1] + 1) % 257
    return [line(ids[:3], ids[3:]), line(ids[:4], ids[4:5]), line(ids[:3], [*ids[3:-1], other])]


def test_a_continuation_is_greedy_if_each_token_is_the_first_largest() -> None:
    model = random_model(config_of("llama"))
    engine = TorchEngine(model)
    with torch.no_grad():
        # The padding of the vocabulary is equal to its first rows, which then win.
        model.head_weight[257:] = model.head_weight[: len(model.head_weight) - 257]
    scored = score_lines(engine, greedy_lines(engine))
    assert [one.greedy for one in scored] == [True, True, False]
    # Two tokens with the same row of the head have the same logit.
    likeliest = greedy_lines(engine)[1]
    (token,) = likeliest.continuation
    twin = token - 1 if token else token + 1
    with torch.no_grad():
        model.head_weight[twin] = model.head_weight[token]
    scored = score_lines(engine, [likeliest, line(likeliest.context, [twin])])
    assert scored[0].logprob == scored[1].logprob
    assert [one.greedy for one in scored] == [token < twin, twin < token]


def test_a_line_that_comes_twice_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(random_model(config_of("gpt2")))
    read = 0
    forward = Decoder.forward

    def counted(self: Decoder, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        nonlocal read
        read += tokens.numel()
        return forward(self, tokens, **options)

    monkeypatch.setattr(Decoder, "forward", counted)
    scored = score_lines(engine, [line([1, 2, 3], [4, 5])] * 3)
    assert (read, len(set(scored))) == (4, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line([], [1]), "line 1 has an empty context"),
        (line([1], []), "line 1 has an empty continuation"),
        (line([1] * LIMIT, [1, 2]), "line 1 has 130 tokens, of which the model scores at most 129"),
        (line([1], [257]), "line 1: id 257 is outside the vocabulary of 257 tokens"),
        (line([-1], [2]), "line 1: id -1 is outside"),
    ],
)
def test_lines_that_cannot_be_scored_are_named(bad: Line, message: str) -> None:
    engine = TorchEngine(random_model(config_of("gpt2")))
    with pytest.raises(ConfigError, match=message):
        score_lines(engine, [line([1], [2]), bad])


def test_no_lines_are_no_work() -> None:
    engine = TorchEngine(random_model(config_of("gpt2")))
    assert score_lines(engine, []) == []
    with pytest.raises(ConfigError, match="rows must be >= 1, got 0"):
        score_lines(engine, [line([1], [2])], rows=0)
