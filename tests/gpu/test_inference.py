"""Texts, beams, drafts and scores of the torch engine on a GPU against the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.conftest import Gpu

from castalia.distributed import initialize
from castalia.inference import LanguageModel, load
from castalia.inference.sampling import Sampling, next_tokens
from castalia.inference.speculative import speculative_complete
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.tokenizers.tokenizer import load_tokenizer

PROMPTS = ["The naïve", "A second guest", "def twice(x):\n    return"]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "bans": {"no_repeat_ngram_size": 3, "min_tokens": 4, "logit_bias": {97: -100.0}},
    "allowed": {"allowed_token_ids": [97, 98, 99, 256]},
    "beams": {"num_beams": 3},
}


def speaker(device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model that learnt nothing, whose next token is nearly always clear."""
    config = NeoxConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257)
    model = Decoder(config)
    initialize(model, start_weights(config, 1))
    with torch.no_grad():
        model.unembed.weight.mul_(40)
    engine = TorchEngine(model.to(device, dtype).requires_grad_(False))
    return LanguageModel(engine, load_tokenizer("bytes"))


@pytest.fixture
def here(gpu: Gpu) -> LanguageModel:
    """The model on the GPU."""
    return speaker(gpu.device)


@pytest.fixture
def there() -> LanguageModel:
    """The model on the CPU."""
    return speaker(torch.device("cpu"))


@pytest.mark.parametrize("name", OPTIONS)
def test_texts_are_those_of_the_cpu(
    name: str, here: LanguageModel, there: LanguageModel, gpu: Gpu
) -> None:
    assert here.engine.device == gpu.device
    ours = here.complete(PROMPTS, 12, **OPTIONS[name])
    theirs = there.complete(PROMPTS, 12, **OPTIONS[name])
    assert [made.tokens for made in ours] == [made.tokens for made in theirs]


def test_a_shared_prefix_and_drafts(here: LanguageModel, there: LanguageModel) -> None:
    long = [PROMPTS[0] + " café owner said: “¡Olé!” and" + end for end in ("", " poured", " p")]
    ours = here.complete(long, 8)
    assert [made.text for made in ours] == [made.text for made in there.complete(long, 8)]
    drafted = speculative_complete(here, PROMPTS, 12, draft="lookup")
    plain = there.complete(PROMPTS, 12)
    assert [made.tokens for made, _ in drafted] == [made.tokens for made in plain]


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_draws_are_repeatable(draft: str | None, here: LanguageModel) -> None:
    texts = []
    for _ in range(2):
        options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 3}
        if draft is None:
            made = here.complete(PROMPTS, 10, typical_p=0.95, **options)
        else:
            pairs = speculative_complete(here, PROMPTS, 10, draft=draft, **options)
            made = [one for one, _ in pairs]
        texts.append([each.tokens for each in made])
    assert texts[0] == texts[1]


def test_draws_have_the_distribution(gpu: Gpu) -> None:
    logits = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.0], device=gpu.device)
    sampling = Sampling(temperature=1.0, seed=1)
    rows = 400
    drawn = next_tokens(logits.expand(rows, -1), sampling, sampling.generators(rows, gpu.device))
    assert drawn.device == gpu.device
    shares = drawn.cpu().bincount(minlength=5) / rows
    assert float((shares - logits.cpu().softmax(0)).abs().max()) < 0.08


def test_scores(here: LanguageModel, there: LanguageModel, gpu: Gpu) -> None:
    for text in PROMPTS:
        gpu.same(here.logprobs(text), there.logprobs(text), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, there: LanguageModel, gpu: Gpu) -> None:
    model = speaker(gpu.device, dtype)
    ids = there.encode(PROMPTS[0])
    expected = there.logits(ids)
    gpu.same(model.logits(ids), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
    assert len(model.complete(PROMPTS, 4)) == 3


def test_a_run_is_loaded_onto_the_gpu(four_steps: Path, gpu: Gpu) -> None:
    model = load(four_steps, engine="torch", dtype="bf16", device="cuda")
    assert model.engine.device == gpu.device
    there = load(four_steps, engine="torch", device="cpu")
    gpu.same(model.logits([1, 2, 3]), there.logits([1, 2, 3]), rtol=0.1, atol=0.1)
