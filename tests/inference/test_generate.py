"""Generation: greedy against the model, ragged batches, limits, stop strings, repeatable draws."""

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.inference import LanguageModel

PROMPTS = ["The naïve", "A second guest, who came in", "def", "T", "", "asked for the same 🍵"]


def greedy_without_cache(model: LanguageModel, ids: list[int], count: int) -> list[int]:
    """One whole forward pass a token."""
    made: list[int] = []
    for _ in range(count):
        logits = model.logits(ids + made)[-1, : model.config.vocab_size]
        token = int(logits.argmax())
        if token == model.eod_id:
            break
        made.append(token)
    return made


def test_it_learnt_the_text(speaker: LanguageModel, known_text: str) -> None:
    rest = known_text[len("The naïve") :]
    assert speaker.generate("The naïve", 48) == rest.encode()[:48].decode()


def test_the_cache_changes_nothing(speaker: LanguageModel) -> None:
    for prompt in PROMPTS[:4]:
        ids = speaker.tokenizer.encode(prompt)
        assert speaker.generate_ids(ids, 24) == greedy_without_cache(speaker, ids, 24)


def test_a_ragged_batch_equals_one_by_one(speaker: LanguageModel) -> None:
    together = speaker.generate(PROMPTS, max_new_tokens=40)
    assert together == [speaker.generate(prompt, max_new_tokens=40) for prompt in PROMPTS]


def test_more_prompts_than_one_batch_holds(speaker: LanguageModel) -> None:
    prompts = PROMPTS * 4
    assert speaker.generate(prompts, 6) == [speaker.generate(prompt, 6) for prompt in PROMPTS] * 4
    drawn = speaker.generate(prompts, 6, temperature=1.5, seed=3)
    assert drawn[20] == speaker.generate(prompts[20], 6, temperature=1.5, seed=23)


def test_ids_in_ids_out(speaker: LanguageModel) -> None:
    ids = speaker.tokenizer.encode_batch(["The naïve", "def"])
    assert speaker.generate_ids(ids, 9) == [speaker.generate_ids(one, 9) for one in ids]
    assert [
        speaker.tokenizer.decode(made) for made in speaker.generate_ids(ids, 9)
    ] == speaker.generate(["The naïve", "def"], 9)


def test_the_end_of_document_ends_the_text(speaker: LanguageModel) -> None:
    (done,) = speaker.complete(["    return x"], max_new_tokens=60)
    assert done.finish_reason == "eod"
    assert done.text == " + x\n"
    assert speaker.eod_id not in done.tokens


def test_an_empty_prompt_starts_after_a_document(speaker: LanguageModel) -> None:
    assert speaker.generate("", 9) == "The naïv"
    assert speaker.generate_ids([], 9) == speaker.generate_ids([speaker.eod_id], 9)


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        ("owner", " café "),
        ("é owner s", " caf"),
        ([" said", "zzz"], " café owner"),
        (["wner", "owner said"], " café o"),  # the one that is whole first
    ],
)
def test_stop_strings_across_tokens(
    speaker: LanguageModel, stop: str | list[str], want: str
) -> None:
    (done,) = speaker.complete(["The naïve"], max_new_tokens=60, stop=stop)
    assert (done.text, done.finish_reason) == (want, "stop")
    assert "".join(speaker.stream("The naïve", 60, stop=stop)) == want


def test_the_stream_gives_whole_characters(speaker: LanguageModel, known_text: str) -> None:
    prompt = known_text[:40]
    pieces = list(speaker.stream(prompt, max_new_tokens=50))
    assert "".join(pieces) == speaker.generate(prompt, 50) and "🍵" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_the_stream_returns_its_completion(speaker: LanguageModel) -> None:
    stream = speaker.stream("def", max_new_tokens=5)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            done = end.value
            break
    assert done.text == "".join(pieces) and done.finish_reason == "length" and len(done.tokens) == 5


def test_the_limit_of_the_model_ends_a_text_and_says_so(speaker: LanguageModel) -> None:
    prompt = [65] * 250
    (done,) = speaker.complete([prompt], max_new_tokens=64)
    assert done.finish_reason == "context" and len(done.tokens) == 6
    with pytest.warns(UserWarning, match="limit of 256 tokens"):
        speaker.generate("A" * 250, 64)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("A" * 256, {}, "the prompt has 256 tokens but the model reads at most 256"),
        ("A", {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ("A", {"temperature": -1.0}, "temperature must be a number >= 0, got -1.0"),
        (
            "A",
            {"top_k": -2, "top_p": 1.5},
            "top_k must be >= 0, got -2; top_p must be from 0 to 1, got 1.5",
        ),
        (
            "a\ud83c",
            {},
            "the prompt is not valid Unicode: character 1 is U\\+D83C, half of a surrogate",
        ),
        ("a", {"stop": ["b", "\udf75"]}, "a stop string is not valid Unicode: character 0"),
        ([300], {}, "id 300 is outside the vocabulary of 257 tokens"),
    ],
)
def test_bad_input_is_one_sentence(
    speaker: LanguageModel, prompt: str | list[int], options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        speaker.complete([prompt], **options)


def test_a_seed_repeats_a_draw_and_leaves_the_global_generator_alone(
    speaker: LanguageModel,
) -> None:
    state = torch.random.get_rng_state()
    one = speaker.generate(["The", "A"], 30, temperature=2.0, seed=5)
    assert speaker.generate(["The", "A"], 30, temperature=2.0, seed=5) == one
    assert speaker.generate(["The", "A"], 30, temperature=2.0, seed=6) != one
    assert speaker.generate("The", 30, temperature=2.0, seed=5) == one[0]
    speaker.generate("The", 3, temperature=2.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_padding_of_the_vocabulary_is_never_drawn(speaker: LanguageModel) -> None:
    assert speaker.config.padded_vocab_size == 384
    made = speaker.generate_ids([[65]] * 8, 60, temperature=50.0, seed=1)
    assert max(max(ids) for ids in made if ids) < 257


def test_logprobs_are_those_of_the_logits(speaker: LanguageModel) -> None:
    ids = (speaker.tokenizer.encode("The naïve café owner said") * 10)[:256]
    whole = speaker.logits(ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert speaker.logits(ids).shape == (256, 384)
    assert (speaker.logprobs(ids) - whole).abs().max() < 1e-5
    assert torch.equal(speaker.logprobs("def"), speaker.logprobs(list(b"def")))


def test_without_a_tokenizer_ids_still_work(speaker: LanguageModel) -> None:
    bare = LanguageModel(speaker.model)
    assert bare.generate_ids([84, 104], 4) == speaker.generate_ids([84, 104], 4)
    with pytest.raises(ConfigError, match="no tokenizer"):
        bare.generate("Th")
    with pytest.raises(ConfigError, match="no end-of-document token"):
        bare.generate_ids([])
