"""Speculative decoding: the model's own greedy text, and exactly its distribution when drawn."""

from pathlib import Path

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.inference import LanguageModel, load
from castalia.inference.sampling import Sampling, distribution
from castalia.inference.speculative import GUESSES, LookupDraft, judge, speculative_complete
from castalia.models import Decoder, NeoxConfig
from castalia.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def early(run_folder: Path) -> LanguageModel:
    """The same run's start weights: a draft that is nearly always wrong."""
    return load(run_folder / "step0")


def prompts_of(text: str, count: int) -> list[str]:
    """Beginnings at many places of a text, of many lengths."""
    return [text[i : i + 3 + i % 17] for i in range(count)]


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize(
    "draft", ["lookup", "itself", pytest.param("early", marks=pytest.mark.slow)]
)
def test_greedy_text_is_the_models_own_on_200_prompts(
    run_folder: Path, early: LanguageModel, known_text: str, engine: str, draft: str
) -> None:
    model = load(run_folder, engine=engine, dtype="fp32")
    helper = {"lookup": "lookup", "itself": model, "early": early}[draft]
    prompts = prompts_of(known_text * 2, 200)
    made = speculative_complete(model, prompts, 24, draft=helper, stop="two")
    plain = model.complete(prompts, 24, stop="two")
    assert [done.tokens for done, _ in made] == [done.tokens for done in plain]
    assert [(done.text, done.finish_reason) for done, _ in made] == [
        (d.text, d.finish_reason) for d in plain
    ]
    kept = sum(tally.kept for _, tally in made) / sum(tally.guessed for _, tally in made)
    passes = sum(tally.passes for _, tally in made) / sum(len(done.tokens) for done, _ in made)
    if draft == "itself":
        assert kept > 0.85 and passes < 0.3
    if draft == "early":
        assert kept < 0.3


def test_drawn_tokens_have_the_models_distribution() -> None:
    """One place, many trials: shares of the first token against p, for a draft with another q."""
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0)
    logits = torch.tensor([[0.5, 2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    p = distribution(logits[:1], sampling)[0]
    q = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    trials = 20000
    for chances in (q, None):
        counts = torch.zeros(5)
        for _ in range(trials):
            guess = int(torch.multinomial(q, 1, generator=generator)) if chances is not None else 3
            counts[judge(logits, [guess], [chances], sampling, generator)[0]] += 1
        # Five standard deviations of the largest share.
        assert (counts / trials - p).abs().max() < 5 * (0.25 / trials) ** 0.5


def test_a_drawn_text_repeats_with_its_seed(run_folder: Path, early: LanguageModel) -> None:
    model = load(run_folder)
    options = {"temperature": 1.3, "top_p": 0.95, "seed": 5}
    first = speculative_complete(model, ["The"], 30, draft=early, **options)[0][0].text
    assert first == speculative_complete(model, ["The"], 30, draft=early, **options)[0][0].text
    assert (
        first
        != speculative_complete(model, ["The"], 30, draft=early, **options | {"seed": 6})[0][0].text
    )


def test_look_up_finds_the_longest_and_latest_match() -> None:
    draft = LookupDraft()
    assert draft.guess([1, 2, 3, 9, 2, 3, 7, 8, 2, 3], 2)[0] == [7, 8]
    assert draft.guess([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 2)[0] == [9, 2]
    assert draft.guess([1, 2, 3], 2)[0] == []


def test_what_cannot_draft_is_refused(run_folder: Path, speaker: LanguageModel) -> None:
    other = NeoxConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=99,
        max_position_embeddings=256,
    )
    short = NeoxConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=257,
        max_position_embeddings=64,
    )
    with pytest.raises(ConfigError, match="another vocabulary"):
        speculative_complete(speaker, ["a"], draft=LanguageModel(Decoder(other)))
    with pytest.raises(ConfigError, match="reads 64 tokens and the model 256"):
        speculative_complete(
            speaker, ["a"], draft=LanguageModel(Decoder(short), load_tokenizer("bytes"))
        )
    with pytest.raises(ConfigError, match="unknown draft 'small'; give lookup or a model"):
        speculative_complete(speaker, ["a"], draft="small")
    with pytest.raises(ConfigError, match="at least one token"):
        speculative_complete(speaker, ["a"], draft="lookup", guesses=0)
    assert GUESSES > 1
