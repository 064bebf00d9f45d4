"""Log-likelihoods of many lines at once, against each line alone."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.inference.test_native_families import COMPILED, config_of, native, random_model

from castalia.core.errors import ConfigError
from castalia.eval.likelihoods import readers
from castalia.eval.likelihoods.prefixes import sections_of
from castalia.eval.likelihoods.readers import DecoderReader
from castalia.eval.likelihoods.scoring import Likelihood, Line, score_lines
from castalia.inference import native_engine, quick
from castalia.inference.engine import Engine
from castalia.inference.native_engine import NativeEngine, NativeSlots
from castalia.inference.quick import quick_model
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder
from castalia.models.scaling import RopeScaling
from castalia.native import compiled
from castalia.native.weights import packed_weights

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


def test_padding_does_not_scale_the_positions_of_shorter_lines() -> None:
    """Dynamic scaling follows the length of a row beyond the trained one."""
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_position_embeddings=16)
    config = config_of("llama").model_copy(update={"rope_scaling": scaling})
    engine = TorchEngine(random_model(config))
    for one in some_lines():
        ids = [*one.context, *one.continuation]
        # As the harness's hf model does, which does not read the last token.
        logprobs = engine.logits(ids[:-1]).log_softmax(1)[len(one.context) - 1 :]
        want = float(logprobs[range(len(one.continuation)), one.continuation].double().sum())
        (got,) = score_lines(engine, [one])
        assert got.logprob == pytest.approx(want, rel=2e-5, abs=2e-5)
    lines = some_lines()
    together = score_lines(engine, lines, rows=4)
    for got, one in zip(together, lines, strict=True):
        (want_alone,) = score_lines(engine, [one])
        assert got.logprob == pytest.approx(want_alone.logprob, rel=2e-5, abs=2e-5)


@COMPILED
def test_the_native_engine_scores_in_bf16_where_it_scores_texts_so() -> None:
    model = random_model(config_of("mistral"))
    weights = packed_weights(model.state_dict(), model.config, "int8")
    engine = NativeEngine(weights, scoring="bf16")
    exact = TorchEngine(model)
    lines = some_lines()
    several = score_lines(engine, lines, rows=4)
    assert engine.scorer is not None
    for got, one in zip(several, lines, strict=True):
        want = alone(engine, one).logprob
        count = len(one.continuation)
        # In bf16 a batch rounds otherwise than a line alone: by far less than bf16 itself does.
        assert abs(got.logprob - want) < 0.02 * count**0.5 + 1e-3 * abs(want)
    assert score_lines(engine, lines[:1]) != score_lines(exact, lines[:1])


@COMPILED
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_the_native_engine_scores_in_its_own_arithmetic(storage: str) -> None:
    engine = native(random_model(config_of("mistral")), storage)
    assert engine.compiled is not None
    require_equal(engine, some_lines())


@COMPILED
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_predictions_without_logits_are_those_of_the_logits(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(config_of("mistral"))
    lines = some_lines()
    for token in range(10):
        logits = native(model, storage).logits([token, 7])
        lines.append(line([token, 7], [int(logits[-1, :257].argmax())]))
    with torch.no_grad():
        # Half of the time a padding token is the largest, and no line's continuation is greedy.
        model.head_weight[257:] = 1.02 * model.head_weight[: len(model.head_weight) - 257]
    engine = native(model, storage)
    asked = []
    predict = NativeSlots.predict

    def counted(slots: Any, *given: Any) -> Any:
        for found in predict(slots, *given):
            asked.append(len(found.losses))
            yield found

    monkeypatch.setattr(NativeSlots, "predict", counted)
    several = score_lines(engine, lines, rows=4)
    assert sum(asked) > 100
    # Passes of a few tokens, of some of which nothing is asked.
    monkeypatch.setattr(native_engine, "ROWS_AT_ONCE", 7)
    in_parts = score_lines(engine, lines, rows=4)
    monkeypatch.setattr(readers, "NativeSlots", ())
    del asked[:]
    want = score_lines(engine, lines, rows=4)
    assert not asked and {one.greedy for one in want} == {True, False}
    for scored in (several, in_parts):
        assert [one.greedy for one in scored] == [one.greedy for one in want]
        logprobs = [one.logprob for one in scored]
        assert logprobs == pytest.approx([one.logprob for one in want], rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("case", ["layers in turn", "rpe", "gpt2", "llama"])
def test_products_of_onednn_score_alike(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(random_model(config_of(case)))
    other = quick_model(engine.model)
    assert {id(one) for one in other.decoder.parameters()} == {
        id(one) for one in engine.model.parameters()
    }
    assert not any(type(module) is torch.nn.Linear for module in other.decoder.modules())
    assert any(type(module) is torch.nn.Linear for module in engine.model.modules())
    monkeypatch.setattr(engine, "scoring_model", lambda: other)
    require_equal(engine, some_lines())


def test_the_choice_of_products_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(config_of("gpt2"))
    asked: list[Any] = []

    def fastest(shape: tuple[int, int], *options: Any) -> str:
        asked.append(shape)
        return "fp32_onednn"

    monkeypatch.setattr(quick, "fastest", fastest)
    assert quick.scoring_model(model).decoder is model
    monkeypatch.setattr(quick, "LEAST_WEIGHTS", 1)
    assert quick.scoring_model(model).decoder is not model
    assert asked == [(256, 64)]
    # oneDNN's operator is used for plain weights of float32 alone.
    assert quick.scoring_model(model.bfloat16()).decoder is model


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


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens in each pass of a decoder, padding included."""
    sizes: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(tokens.numel())
        return forward(self, tokens, **options)

    monkeypatch.setattr(Decoder, "forward", counted)
    return sizes


def test_what_lines_share_is_read_once(read: list[int]) -> None:
    engine = TorchEngine(random_model(config_of("gpt2")))
    scored = score_lines(engine, [line([1, 2, 3], [4, 5])] * 3)
    assert (read, len(set(scored))) == ([4], 1)
    read.clear()
    # One context, two single tokens, and two continuations whose last token is not read.
    context = list(range(40))
    choices = [line(context, more) for more in ([1], [2], [7, 8, 9], [5, 6])]
    score_lines(engine, choices)
    assert read == [40, 2, 1]
    read.clear()
    # Forty tokens of examples, then six questions with two answers each.
    questions = [[n, *range(50, 61)] for n in range(70, 76)]
    answers = ([3, 4, 5, 6, 7, 8], [9, 10])
    lines = [line(context + question, more) for question in questions for more in answers]
    require_equal(engine, lines)
    read.clear()
    score_lines(engine, lines)
    assert read[:2] == [40, 6 * 12]
    assert sum(read) == 40 + 6 * (12 + 5 + 1)


def test_a_pass_has_no_more_tokens_for_short_stems_with_long_branches(read: list[int]) -> None:
    """Two texts each that part after ten tokens: ten stems fit in a pass, not their branches."""
    generator = random.Random(1)
    lines = []
    for number in range(10):
        start = [number, *(generator.randrange(257) for _ in range(9))]
        for _ in range(2):
            rest = [generator.randrange(257) for _ in range(80)]
            lines.append(line(start[:1], start[1:] + rest))
    engine = TorchEngine(random_model(config_of("gpt2")))
    score_lines(engine, lines, rows=2)
    assert sum(read) == 10 * 10 + 20 * 79
    assert max(read) <= 2 * DecoderReader.row_tokens


def random_lines(generator: random.Random) -> list[Line]:
    """Lines out of few tokens, which continue one another's beginnings at random places."""
    lines: list[Line] = []
    for _ in range(generator.randint(1, 40)):
        ids: list[int] = []
        if lines and generator.random() < 0.8:
            other = generator.choice(lines)
            whole = [*other.context, *other.continuation]
            ids = whole[: generator.randint(0, len(whole))]
        length = max(2, len(ids) + generator.choice([0, 1, 2, 5, 40]))
        ids = [*ids, *(generator.randrange(3) for _ in range(length))][: min(length, LIMIT + 1)]
        cut = generator.randint(1, len(ids) - 1)
        lines.append(line(ids[:cut], ids[cut:]))
    return lines


@pytest.mark.parametrize("seed", range(12))
def test_any_set_of_lines_is_scored_as_each_alone(seed: int) -> None:
    generator = random.Random(seed)
    lines = random_lines(generator)
    model = random_model(config_of(FAMILIES[seed % len(FAMILIES)]))
    engine: Engine = TorchEngine(model)
    if seed % 4 == 0 and compiled.library() is not None:
        engine = native(model, "fp32")
    together = score_lines(engine, lines, rows=generator.choice([1, 3, 16]))
    for got, one in zip(together, lines, strict=True):
        ids = [*one.context, *one.continuation]
        want = float(engine.logprobs(ids)[len(one.context) - 1 :].double().sum())
        assert got.logprob == pytest.approx(want, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_covers_each_input_once(seed: int) -> None:
    generator = random.Random(seed)
    inputs = [one.context + one.continuation for one in random_lines(generator)]
    most = generator.choice([1, 2, 16])
    covered: list[set[int]] = [set() for _ in inputs]
    reads = 0
    for header, groups in sections_of(inputs, most):
        spans = [header]
        for stem, branches in groups:
            assert stem.start == header.end < stem.end
            assert len(branches) <= most
            assert all(branch.start == stem.end < branch.end for branch in branches)
            spans += [stem, *branches]
        for span in spans:
            reads += span.end - span.start
            assert len({inputs[number][: span.end] for number in span.lines}) <= 1
            for number in span.lines:
                assert covered[number].isdisjoint(range(span.start, span.end))
                covered[number].update(range(span.start, span.end))
    assert [len(places) for places in covered] == [len(ids) for ids in inputs]
    assert reads <= sum(len(ids) for ids in set(inputs))


def test_beginnings_of_one_another_are_a_chain_of_any_length() -> None:
    ids = tuple(range(3000))
    sections = sections_of([ids[:size] for size in range(1, 3001)], 16)
    assert sum(len(section.groups) for section in sections) > 1


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
