"""Bans, bias, penalties and grammars: transformers' processors, closed forms, every way of
decoding."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.inference import LanguageModel
from castalia.inference.sampling import Sampling, distribution
from castalia.inference.speculative import speculative_complete
from castalia.inference.steering import Steering

PROMPT = "The naïve"
V = 257


def steering(
    speaker: LanguageModel, prompt: list[int], endings: dict[str, Any] | None = None, **options: Any
) -> Steering:
    """The steering of a text after `prompt`."""
    sampling, ending, _ = speaker.split_options({**options, **(endings or {})})
    return Steering(sampling, speaker.continuation(prompt, 20, ending))


def noise(seed: int) -> torch.Tensor:
    """Logits (V,) of both signs."""
    return 3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def test_transformers_has_the_same_processors(speaker: LanguageModel) -> None:
    """Repetition penalty, min length, bias, n-grams."""
    hf = pytest.importorskip("transformers")
    prompt, tokens = [5, 9, 9, 40], [7, 5, 200]
    ids = torch.tensor([[*prompt, *tokens]])
    logits = noise(1)
    for penalty in (0.5, 1.3, 4.0):
        theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
        ours = steering(speaker, prompt, repetition_penalty=penalty)(logits, tokens)
        assert torch.equal(ours, theirs)
    for count in (3, 4):
        theirs = hf.MinNewTokensLengthLogitsProcessor(len(prompt), count, 256)(ids, logits[None])
        ours = steering(speaker, prompt, {"min_tokens": count})(logits, tokens)
        assert torch.equal(ours, theirs[0]) and (ours[256] == -math.inf) == (count == 4)
    theirs = hf.SequenceBiasLogitsProcessor([[[7], 2.5], [[30], -4.0]])(ids, logits[None].clone())
    ours = steering(speaker, prompt, logit_bias={7: 2.5, 30: -4.0})(logits, tokens)
    assert torch.equal(ours, theirs[0])
    for size in (1, 2, 3, 7, 8):
        # The last two tokens stood before, with 9 and 7 behind them.
        repeated = torch.cat([ids, torch.tensor([[9, 40, 7, 5, 3, 9, 40]])], 1)
        theirs = hf.NoRepeatNGramLogitsProcessor(size)(repeated, logits[None].clone())[0]
        steer = steering(speaker, prompt, no_repeat_ngram_size=size)
        ours = steer(logits, repeated[0, len(prompt) :].tolist())
        assert torch.equal(ours, theirs)
        assert int((ours == -math.inf).sum()) == {1: 6, 2: 1, 3: 1}.get(size, 0)


def test_transformers_has_the_same_order(speaker: LanguageModel) -> None:
    """Bias, repetition penalty, n-grams, least length; then the filters."""
    hf = pytest.importorskip("transformers")
    prompt, tokens = [5, 9, 9, 40], [7, 5, 200, 5]
    ids = torch.tensor([[*prompt, *tokens]])
    logits = noise(3)
    chain = hf.LogitsProcessorList(
        [
            hf.SequenceBiasLogitsProcessor([[[9], -8.5], [[200], 4.0]]),
            hf.RepetitionPenaltyLogitsProcessor(1.7),
            hf.NoRepeatNGramLogitsProcessor(2),
            hf.MinNewTokensLengthLogitsProcessor(len(prompt), 5, 256),
            hf.TemperatureLogitsWarper(1.7),
            hf.TopKLogitsWarper(40),
            hf.MinPLogitsWarper(0.15),
        ]
    )
    options = {
        "logit_bias": {9: -8.5, 200: 4.0},
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
    }
    steered = steering(speaker, prompt, {"min_tokens": 5}, **options)(logits, tokens)
    theirs = chain(ids, logits[None].clone()).softmax(-1)
    ours = distribution(steered[None], Sampling(temperature=1.7, top_k=40, min_p=0.15))
    assert torch.allclose(ours, theirs, atol=1e-6) and 1 < int((ours > 0).sum()) < 40


def test_openai_penalties_are_their_formula(speaker: LanguageModel) -> None:
    """mu - c * frequency - (c > 0) * presence, over the text alone, not the prompt."""
    logits = noise(2)
    tokens = [7, 7, 7, 12]
    steer = steering(speaker, [3, 12], presence_penalty=0.75, frequency_penalty=-0.5)
    want = logits.clone()
    want[7] -= 0.75 - 3 * 0.5
    want[12] -= 0.75 - 1 * 0.5
    assert torch.allclose(steer(logits, tokens), want, atol=1e-6)
    assert torch.equal(steer(logits, []), logits)
    allowed = steering(speaker, [3], allowed_token_ids=[4, 250])(logits, [])
    assert torch.isfinite(allowed).nonzero().flatten().tolist() == [4, 250]


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 4.0},
    {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    {"no_repeat_ngram_size": 2},
    {"logit_bias": {ord("a"): 6.0, ord(" "): -100.0}},
    {"allowed_token_ids": [ord("a"), ord(" "), ord("c")]},
    {"stop_token_ids": [ord("w")]},
    {"min_tokens": 30, "stop": ["ow", "po"]},
    {"min_tokens": 12, "stop_token_ids": [ord("e"), ord("w")], "keep_stop": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: next(iter(one)))
def test_batches_streams_and_guesses_give_one_text(
    speaker: LanguageModel, options: dict[str, Any]
) -> None:
    """Greedy text of `complete`, in a batch of unlike texts, as a stream, and with guesses."""
    (alone,) = speaker.complete([PROMPT], 40, **options)
    assert speaker.complete([PROMPT, "def twice("], 40, **options)[0].tokens == alone.tokens
    assert "".join(speaker.stream(PROMPT, 40, **options)) == alone.text
    for draft in ("lookup", speaker):
        ((guessed, counts),) = speculative_complete(speaker, [PROMPT], 40, draft=draft, **options)
        assert (guessed.text, guessed.finish_reason) == (alone.text, alone.finish_reason)
        assert guessed.tokens == alone.tokens
        assert draft == "lookup" or counts.kept > 0
    assert alone.text != speaker.generate(PROMPT, 40)


def test_what_ends_a_text(speaker: LanguageModel) -> None:
    (done,) = speaker.complete([PROMPT], 40, stop_token_ids=[ord("o")])
    assert (done.text, done.finish_reason) == (" café ", "stop")
    (done,) = speaker.complete([PROMPT], 40, stop_token_ids=[ord("o")], keep_stop=True)
    assert (done.text, done.finish_reason, done.tokens[-1]) == (" café o", "stop", ord("o"))
    assert speaker.generate(PROMPT, 40, stop="own", keep_stop=True) == " café own"
    # A stop string within min_tokens is text; one that ends after them is not.
    assert speaker.generate(PROMPT, 40, stop=["ca", "said"], min_tokens=4) == " café owner "
    assert speaker.generate(PROMPT, 40, stop=["ca", "said"], min_tokens=3) == " café owner "
    assert speaker.generate(PROMPT, 40, stop=["ca", "said"], min_tokens=2) == " "
    # The end-of-document token is banned before min_tokens, text with ignore_eos.
    (whole,) = speaker.complete(["def twice("], 200)
    assert whole.finish_reason == "eod"
    (longer,) = speaker.complete(["def twice("], 200, min_tokens=len(whole.tokens) + 4)
    assert len(longer.tokens) >= len(whole.tokens) + 4 and "<|endoftext|>" not in longer.text
    (beyond,) = speaker.complete(["def twice("], len(whole.tokens) + 4, ignore_eos=True)
    assert beyond.finish_reason == "length" and whole.text + "<|endoftext|>" in beyond.text


def test_seeds_are_int64_and_top_k_may_be_minus_one(speaker: LanguageModel) -> None:
    drawn = {
        seed: speaker.generate([PROMPT] * 2, 12, temperature=2.0, top_k=-1, seed=seed)
        for seed in (-(2**63), -1, 0, 2**63 - 1)
    }
    assert len({drawn[-1][0], drawn[0][0], drawn[0][1]}) == 3
    # The seed after the largest is the smallest; -1 is followed by 0.
    assert drawn[2**63 - 1][1] == drawn[-(2**63)][0] and drawn[-1][1] == drawn[0][0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
    ({"typical_p": -0.1}, "typical_p must be from 0 to 1, got -0.1"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be >= 0, got -1"),
    ({"allowed_token_ids": [97], "no_repeat_ngram_size": 2}, "leaves no token to .* after 2 new"),
    ({"repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100, got 0"),
    ({"presence_penalty": math.nan}, "presence_penalty must be from -2 to 2, got nan"),
    ({"logit_bias": {999: 1.0}}, "logit_bias: id 999 is outside the vocabulary of 257"),
    ({"stop_token_ids": [-1]}, "stop_token_ids: id -1 is outside the vocabulary"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [256], "min_tokens": 2}, "may leave no token to draw"),
    ({"min_tokens": 50}, "min_tokens must be from 0 to max_new_tokens=40, got 50"),
    ({"seed": 2**63}, "seed must be an int64, got 9223372036854775808"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_impossible_options_are_one_sentence(
    speaker: LanguageModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        speaker.generate(PROMPT, 40, **options)


SCHEMA = {
    "type": "object",
    "properties": {"guests": {"type": "integer"}, "drink": {"enum": ["café", "🍵"]}},
    "required": ["guests", "drink"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("draft", [None, "lookup", "itself"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_text_of_a_schema_is_json_of_it(
    speaker: LanguageModel, draft: str | None, temperature: float
) -> None:
    pytest.importorskip("llguidance")
    # Without the penalty, the integer may repeat one digit up to the budget.
    options: dict[str, Any] = {
        "grammar": speaker.grammars.json(SCHEMA),
        "temperature": temperature,
        "frequency_penalty": 1.0,
        "seed": 4,
    }
    prompts = ["def ", "The naïve", "A"]
    if draft is None:
        made = speaker.complete(prompts, 150, **options)
    else:
        helper = speaker if draft == "itself" else draft
        made = [
            one for one, _ in speculative_complete(speaker, prompts, 150, draft=helper, **options)
        ]
    for one in made:
        assert one.finish_reason == "eod", one.text
        value = json.loads(one.text)
        assert value.keys() == {"guests", "drink"} and value["drink"] in ("café", "🍵")
        assert isinstance(value["guests"], int)


def test_a_form_takes_back_rejected_guesses(speaker: LanguageModel) -> None:
    """After any tokens, the next ones are those of a text that began with them."""
    pytest.importorskip("llguidance")
    grammar = speaker.grammars.regex("a(bx|cy)z")
    matcher = grammar.matcher()
    # Up to the end of a text and past it, as a draft guesses; then back, to another beginning.
    for tokens in (b"abxz", [*b"abxz", 256], [*b"abxz", 256, 97], b"ac", b"acy", b"a", b"", b"ab"):
        fresh = grammar.matcher().allowed(list(tokens))
        assert torch.equal(matcher.allowed(list(tokens)), fresh), tokens
    assert matcher.allowed(list(b"ab")).nonzero().flatten().tolist() == [ord("x")]


def chain(count: int, sign: str) -> str:
    """A grammar of which every rule is the next one."""
    names = ["start" if sign == ":" else "root", *(f"r{i}" for i in range(count))]
    rules = [f"{name} {sign} {following}" for name, following in pairwise(names)]
    return "\n".join([*rules, f'{names[-1]} {sign} "a"'])


def test_other_forms_and_forms_that_are_none(speaker: LanguageModel) -> None:
    pytest.importorskip("llguidance")
    grammars = speaker.grammars
    words = ["naïve", "café 🍵\n", *(str(number) for number in range(3000))]
    assert speaker.generate(PROMPT, 20, grammar=grammars.choice(words)) in words
    assert speaker.generate(PROMPT, 20, grammar=grammars.choice(words[1:2])) == words[1]
    digits = speaker.generate(PROMPT, 20, grammar=grammars.regex("[0-9]{3}-ab"))
    assert digits[:3].isdigit() and digits[3:] == "-ab"
    assert speaker.generate(PROMPT, 20, grammar=grammars.grammar('root ::= "x" "y"')) == "xy"
    assert speaker.generate(PROMPT, 20, grammar=grammars.grammar(chain(499, ":"))) == "a"
    compact = grammars.json({"type": "array", "items": {"const": 1}, "minItems": 2}, blanks=None)
    assert speaker.generate(PROMPT, 9, grammar=compact).startswith("[1,1")
    wrong = [
        (lambda: grammars.json({"type": "objekt"}), "the JSON schema cannot be used: Invalid type"),
        (lambda: grammars.json("{"), "the JSON schema cannot be used"),
        (lambda: grammars.json({"enum": ["a" * 70_000]}), "characters; at most 65,536 are"),
        (lambda: grammars.regex("[0-"), "the regular expression cannot be used"),
        (lambda: grammars.grammar("start: nothing"), "the grammar cannot be used.*nothing"),
        (lambda: grammars.grammar("start: start"), "the grammar cannot be used: no text has this"),
        # Each names the next one: recursion over 3000 would end the process.
        (lambda: grammars.grammar(chain(3000, ":")), "has 3,000 rules; at most 500 are compiled"),
        (lambda: grammars.grammar(chain(3000, "::=")), "has 3,001 rules; at most 500 are"),
        (
            lambda: grammars.json('[{"$re\\u0066": "#/a"}' + 500 * ',{"$ref": "#"}' + "]"),
            "has 501 ref",
        ),
        (lambda: grammars.json({"$ref": "#"}), "JSON schema cannot be used: no text has this form"),
        (lambda: LanguageModel(speaker.engine).grammars, "needs a model with a tokenizer.json"),
    ]
    for make, message in wrong:
        with pytest.raises(ConfigError, match=message):
            make()
    for name, value in [("min_tokens", 3), ("ignore_eos", True), ("allowed_token_ids", [97])]:
        with pytest.raises(ConfigError, match=f"{name} does not go with a text of a given form"):
            speaker.generate(PROMPT, 20, grammar=compact, **{name: value})
    # More than the library can follow, which it finds on the way.
    with pytest.raises(ConfigError, match="too many expressions"):
        speaker.generate([PROMPT, PROMPT], 20, grammar=grammars.regex("a{1000000}"))
