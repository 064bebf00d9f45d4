"""Beam search and n-best against transformers: the same texts, the same scores, the same draws."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import castalia
from castalia.core.errors import ConfigError
from castalia.export import export
from castalia.inference import LanguageModel
from castalia.inference.batching import Admission, Batcher
from castalia.inference.beams import BeamSearch, Search
from castalia.inference.sampling import Sampling
from castalia.inference.speculative import speculative_complete

hf = pytest.importorskip("transformers")

VOCABULARY = 61
ENDS = [0, 7]
PROMPTS = [[5], [9, 9, 40, 12, 3], [33, 20, 1]]
PROMPT = "The naïve"


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A GPT-NeoX model of transformers with random weights, far from uniform."""
    torch.manual_seed(3)
    config = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=ENDS,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return hf.GPTNeoXForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder."""
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["torch", "native"])
def ours(request: pytest.FixtureRequest, saved: Path) -> LanguageModel:
    """The same model in float32 on an engine of ours."""
    return castalia.load(saved, engine=request.param, dtype="fp32")


def generated(model: Any, prompt: list[int], seed: int, **options: Any) -> Any:
    """What transformers generates, with the global seed that it draws with."""
    torch.manual_seed(seed)
    return model.generate(
        torch.tensor([prompt]), return_dict_in_generate=True, output_scores=True, **options
    )


def text_of(row: list[int], prompt: list[int]) -> list[int]:
    """The new tokens of a row of transformers' before the one that ended them."""
    new = row[len(prompt) :]
    ends = [place for place, token in enumerate(new) if token in ENDS]
    return new[: ends[0]] if ends else new


DRAWN = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9}
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": 0.0, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "num_return_sequences": 2, "min_tokens": 6, "logit_bias": {7: 6.0, 5: -2.0}},
    {"num_beams": 2, **DRAWN},
    {"num_beams": 4, "num_return_sequences": 4, "logit_bias": {7: 5.0}, **DRAWN},
    {"num_beams": 3, "repetition_penalty": 0.8, "early_stopping": True, "temperature": 0.6},
]
THEIR_NAMES = {"min_tokens": "min_new_tokens"}


def their_options(options: dict[str, Any]) -> dict[str, Any]:
    """Our options under the names of transformers."""
    named = {THEIR_NAMES.get(name, name): value for name, value in options.items()}
    named["do_sample"] = "temperature" in named
    # Their config draws from 50 tokens unless told otherwise.
    if named["do_sample"]:
        named.setdefault("top_k", 0)
    if bias := named.pop("logit_bias", None):
        named["sequence_bias"] = [[[token], value] for token, value in bias.items()]
    return named


@pytest.mark.parametrize("number", range(len(SEARCHES)))
def test_transformers_finds_the_same_texts_and_scores(
    theirs: Any, ours: LanguageModel, number: int
) -> None:
    options = SEARCHES[number]
    done = ours.complete(PROMPTS, 24, seed=11, **options)
    count = options.get("num_return_sequences", 1)
    assert len(done) == count * len(PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        # Row i of a call draws with seed + i.
        want = generated(theirs, prompt, 11 + place, max_new_tokens=24, **their_options(options))
        for rank in range(count):
            got = done[place * count + rank]
            assert got.tokens == text_of(want.sequences[rank].tolist(), prompt)
            assert got.score == pytest.approx(float(want.sequences_scores[rank]), rel=1e-5)
            is_ended = len(want.sequences[rank]) > len(prompt) + len(got.tokens)
            assert (got.finish_reason == "eod") == is_ended or len(got.tokens) == 24


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_beams_over_a_sliding_window_and_grouped_heads(tmp_path: Path, engine: str) -> None:
    """The copied state of a beam is longer than the window of its attention."""
    torch.manual_seed(1)
    config = hf.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        sliding_window=5,
        initializer_range=0.3,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    model = hf.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ours = castalia.load(tmp_path, engine=engine, dtype="fp32")
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4}
    for more in ({}, {"temperature": 1.2}):
        done = ours.complete([PROMPTS[1]], 20, seed=2, **options, **more)
        asked = their_options(options | more)
        want = generated(model, PROMPTS[1], 2, max_new_tokens=20, **asked)
        for got, row, score in zip(done, want.sequences, want.sequences_scores, strict=True):
            assert got.tokens == text_of(row.tolist(), PROMPTS[1])
            assert got.score == pytest.approx(float(score), rel=1e-4)


SINGLE: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 0.9, "min_tokens": 8},
    {"temperature": 1.0},
    DRAWN,
    {"temperature": 0.8, "typical_p": 0.5, "no_repeat_ngram_size": 1, "logit_bias": {7: -5.0}},
]


@pytest.mark.parametrize("number", range(len(SINGLE)))
def test_transformers_writes_the_same_text(theirs: Any, ours: LanguageModel, number: int) -> None:
    """Greedy, and drawn with the same seed."""
    options = SINGLE[number]
    prompt = PROMPTS[1]
    want = generated(theirs, prompt, 5, max_new_tokens=40, **their_options(options))
    made = ours.generate_ids(prompt, 40, seed=5, **options)
    assert made == text_of(want.sequences[0].tolist(), prompt)


def test_transformers_ends_a_search_at_the_same_stop_string(
    run_folder: Path, speaker: LanguageModel, tmp_path: Path
) -> None:
    """On a trained model whose vocabulary is padded: the padding counts in every score."""
    (done,) = export(run_folder, to="hf", output=tmp_path / "hf")
    model = hf.AutoModelForCausalLM.from_pretrained(done.folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(done.folder)
    assert model.config.vocab_size > speaker.config.vocab_size
    ids = speaker.encode(PROMPT)
    for stop in (["own"], ["ca", "é o"]):
        want = generated(
            model, ids, 0, max_new_tokens=20, num_beams=4, num_return_sequences=3,
            stop_strings=stop, tokenizer=tokenizer,
        )  # fmt: skip
        found = speaker.complete([PROMPT], 20, stop=stop, num_beams=4, num_return_sequences=3)
        for got, row, score in zip(found, want.sequences, want.sequences_scores, strict=True):
            new = row.tolist()[len(ids) :]
            assert got.tokens == new[: len(got.tokens)]
            assert set(new[len(got.tokens) :]) <= {model.generation_config.eos_token_id}
            assert got.score == pytest.approx(float(score), rel=1e-4)
        assert found[0].finish_reason == "stop"


def test_several_texts_of_a_prompt_are_drawn_with_seeds_of_their_own(ours: LanguageModel) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 30}
    made = ours.generate_ids(PROMPTS, 12, num_return_sequences=3, seed=4, **options)
    alone = [
        ours.generate_ids(prompt, 12, seed=4 + 3 * place + number, **options)
        for place, prompt in enumerate(PROMPTS)
        for number in range(3)
    ]
    assert made == alone and made[0] != made[1]
    assert ours.generate_ids(PROMPTS[0], 12, num_return_sequences=2, seed=4, **options) == alone[:2]


def test_a_prompt_of_several_texts_is_read_once(ours: LanguageModel) -> None:
    """Texts of one prompt begin with a copy of it, and draw as if they had read it."""
    prompt = list(range(1, 7)) * 4
    sampling = Sampling(temperature=1.5, seed=9)
    batcher = Batcher(ours.engine, 4, 64)
    prompts = [prompt, [5, 3], prompt, prompt]
    texts = [ours.continuation(ids, 12) for ids in prompts]
    generators = sampling.generators(4, ours.engine.device)
    batcher.admit(
        [Admission(text, sampling, one) for text, one in zip(texts, generators, strict=True)]
    )
    assert batcher.prefix_tokens == 2 * len(prompt)
    while batcher.running:
        batcher.step()
    for place, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        assert text.tokens == ours.generate_ids(ids, 12, temperature=1.5, seed=9 + place)


def test_a_text_of_a_beam_search_ends_like_any_other(speaker: LanguageModel) -> None:
    """Stop strings, characters, forms and lists of prompts."""
    (best, second) = speaker.complete([PROMPT], 30, num_beams=3, num_return_sequences=2)
    assert best.score is not None and second.score is not None and best.score >= second.score
    assert best.text == speaker.generate(PROMPT, 30, num_beams=3)
    # The model learnt its text by heart, so that the best text is the greedy one.
    assert best.text == speaker.generate(PROMPT, 30)
    (cut,) = speaker.complete([PROMPT], 30, num_beams=3, stop="own")
    assert (cut.text, cut.finish_reason) == (" café ", "stop")
    texts = speaker.generate([PROMPT, "def tw"], 6, num_beams=2, num_return_sequences=2)
    assert texts[:2] == speaker.generate(PROMPT, 6, num_beams=2, num_return_sequences=2)
    assert len(texts) == 4 and texts[2].startswith("ice(x)")
    pytest.importorskip("llguidance")
    words = ["naïve", "café", "tea"]
    form = speaker.grammars.choice(words)
    found = speaker.generate(PROMPT, 9, grammar=form, num_beams=4, num_return_sequences=3)
    assert sorted(found) == sorted(words)
    with pytest.raises(ConfigError, match="found 3 texts of 4: the options allow no more"):
        speaker.generate(PROMPT, 9, grammar=form, num_beams=4, num_return_sequences=4)


def test_searches_and_texts_share_the_steps_of_a_batch(speaker: LanguageModel) -> None:
    """A search that enters while texts run changes neither, and frees its slots at the end."""
    prompt = "The naïve café owner"
    ids = speaker.encode(prompt)
    batcher = Batcher(speaker.engine, 5, 120)
    (alone,) = speaker.complete([prompt], 30)
    text = speaker.continuation(prompt, 30)
    batcher.admit([Admission(text, Sampling(), torch.Generator())])
    for _ in range(4):
        batcher.step()
    searches = [
        BeamSearch(
            speaker.continuation(prompt, length), Sampling(), Search(2, 2), torch.Generator()
        )
        for length in (9, 20)
    ]
    batcher.admit_searches(searches)
    # The first began with a copy of what the text had read and read one token; the second copied.
    copied = len(ids) - 1 + len(ids)
    assert batcher.free == 0 and batcher.prefix_tokens == copied
    while batcher.searches or batcher.running:
        batcher.step()
    assert batcher.free == 5 and text.completion().tokens == alone.tokens
    for length, search in zip((9, 20), searches, strict=True):
        want = speaker.complete([prompt], length, num_beams=2, num_return_sequences=2)
        assert [one.tokens for one in search.completions()] == [one.tokens for one in want]
    # The slots of beams keep what they read, and a prompt that begins so continues from there.
    known = ids + want[0].tokens[:12]
    batcher.admit([Admission(speaker.continuation(known, 5), Sampling(), torch.Generator())])
    assert batcher.prefix_tokens == copied + len(known) - 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 0}, "num_beams must be >= 1, got 0"),
    ({"num_return_sequences": 0}, "num_return_sequences must be >= 1, got 0"),
    ({"num_beams": 2, "length_penalty": math.inf}, "length_penalty must be a number, got inf"),
    ({"num_beams": 2, "early_stopping": "ever"}, "early_stopping must be true, false or 'never'"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is above num_beams=2"),
    ({"num_return_sequences": 2}, "2 greedy texts would be the same; set a temperature above 0"),
    ({"length_penalty": 2.0}, "length_penalty=2.0 needs a beam search; set num_beams above 1"),
    ({"early_stopping": True}, "early_stopping=True needs a beam search"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_impossible_searches_are_one_sentence(
    speaker: LanguageModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        speaker.generate(PROMPT, 9, **options)


def test_a_beam_search_is_neither_streamed_nor_guessed(speaker: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="num_beams=2 cannot be streamed: a beam search knows"):
        speaker.stream(PROMPT, 9, num_beams=2)
    with pytest.raises(ConfigError, match="num_beams=2 does not go with a draft"):
        speculative_complete(speaker, [PROMPT], 9, draft="lookup", num_beams=2)
    options: dict[str, Any] = {"temperature": 2.0, "seed": 3, "typical_p": 0.9}
    guessed = speculative_complete(
        speaker, [PROMPT], 9, draft="lookup", num_return_sequences=2, **options
    )
    assert len(guessed) == 2 and guessed[0][0].text != guessed[1][0].text
