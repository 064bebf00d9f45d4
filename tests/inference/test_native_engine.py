"""The native engine against the model itself: every storage, both implementations, slots."""

import pytest
import torch

from castalia.distributed import initialize
from castalia.inference.batching import Admission, Batcher
from castalia.inference.engine import Engine
from castalia.inference.language_model import LanguageModel
from castalia.inference.native_engine import NativeEngine
from castalia.inference.sampling import Sampling
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.native import compiled
from castalia.native.compiled import KINDS
from castalia.native.packing import STORAGES
from castalia.native.weights import packed_weights

SHAPES = {
    "pythia": NeoxConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=257),
    "all options": NeoxConfig(
        num_layers=2,
        hidden_size=96,
        num_attention_heads=4,
        vocab_size=301,
        make_vocab_size_divisible_by=1,
        parallel_residual=False,
        rotary_pct=1.0,
        activation="gelu",
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        layernorm_epsilon=1e-3,
    ),
    "no rotary": NeoxConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=100,
        rotary_pct=0,
        rope_numerics="neox_v1_fp16",
    ),
}
ERROR = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.004, "int8": 0.12, "int4": 1.0}
"""Largest difference of a logit of random models whose logits have a deviation of about 0.6."""
KERNELS = [
    "torch",
    pytest.param(
        "auto", marks=pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler here")
    ),
]


def random_model(config: NeoxConfig) -> Decoder:
    """Start weights, with biases and norms that are not at their neutral values."""
    model = Decoder(config)
    initialize(model, start_weights(model.config, 1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def native(
    model: Decoder, storage: str, kernels: str = "auto", scoring: str | None = None
) -> NativeEngine:
    """The model in one storage."""
    return NativeEngine(packed_weights(model.state_dict(), model.config, storage), kernels, scoring)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(shape: str, storage: str, kernels: str) -> None:
    model = random_model(SHAPES[shape])
    ids = torch.randint(
        0, model.config.vocab_size, (150,), generator=torch.Generator().manual_seed(3)
    ).tolist()
    want = TorchEngine(model).logits(ids)
    got = native(model, storage, kernels).logits(ids)
    assert got.shape == want.shape
    assert (got - want).abs().max() < ERROR[storage]


@pytest.mark.parametrize("kernels", KERNELS)
def test_ragged_prompts_in_one_pass_equal_one_by_one(kernels: str) -> None:
    engine = native(random_model(SHAPES["pythia"]), "int8", kernels)
    prompts = [[5], list(range(40)), [7, 8, 9], list(range(100, 117))]
    together, alone = engine.slots(6, 64), engine.slots(1, 64)
    got = together.feed([4, 0, 5, 2], prompts).clone()
    # Every kernel scales each row by itself but one, which competes among those of torch.
    tolerance = 1e-5 if kernels == "auto" else 0.06
    for row, ids in zip(got, prompts, strict=True):
        alone.clear(0)
        assert (row - alone.feed([0], [ids])[0]).abs().max() < tolerance
    more = together.feed([5, 4], [[10], [6, 7]]).clone()
    alone.clear(0)
    assert (more[0] - alone.feed([0], [[7, 8, 9, 10]])[0]).abs().max() < tolerance


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_long_prompt_is_read_in_passes(kernels: str) -> None:
    engine = native(random_model(SHAPES["pythia"]), "fp32", kernels)
    ids = torch.randint(0, 257, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    slots = engine.slots(2, 800)
    got = slots.feed([1, 0], [ids, ids[:300]])
    want = engine.logits(ids)
    assert (got[0] - want[-1]).abs().max() < 1e-4 and (got[1] - want[299]).abs().max() < 1e-4


@pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("threads", (1, 2, 3, 5, 7))
@pytest.mark.parametrize("storage", KINDS)
def test_the_step_names_the_first_of_the_largest_logits_and_no_padding(
    storage: str, threads: int
) -> None:
    # The head has 17 panels, which no number of threads and streams divides.
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    model = random_model(NeoxConfig(**sizes, vocab_size=257, make_vocab_size_divisible_by=8))
    with torch.no_grad():
        head = model.head_weight
        # Many tokens with equal logits, and padding whose logits are the largest of all.
        head[:257] = head[:7].repeat(37, 1)[:257]
        head[257:] = 50 * head[:7]
    slots = native(model, storage).slots(20, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 9, 20):
            prompts = [[11 * count + row, *range(row % 3)] for row in range(count)]
            logits = slots.feed(range(count), prompts)
            assert (logits.argmax(1) >= 257).all()
            assert slots.best == logits[:, :257].numpy().argmax(1).tolist()
            assert max(slots.best) < 7
    finally:
        torch.set_num_threads(before)


def engines(speaker: LanguageModel) -> list[Engine]:
    """Every engine in float32 that needs nothing installed."""
    made: list[Engine] = [speaker.engine, native(speaker.model, "fp32", "torch")]
    return [*made, native(speaker.model, "fp32")] if compiled.library() else made


def test_float32_engines_say_the_same(speaker: LanguageModel, known_text: str) -> None:
    prompts = [
        "The naïve",
        "A second guest, who came in",
        "def",
        "",
        "asked for the same 🍵",
        known_text[:150],
    ]
    said = [LanguageModel(engine, speaker.tokenizer) for engine in engines(speaker)]
    want = said[0].generate(prompts, 40)
    drawn = said[0].generate(prompts, 40, temperature=1.3, top_k=20, top_p=0.9, seed=7)
    for other in said[1:]:
        assert other.generate(prompts, 40) == want
        assert other.generate(prompts, 40, temperature=1.3, top_k=20, top_p=0.9, seed=7) == drawn
        assert [other.generate(prompt, 40) for prompt in prompts] == want
        assert "".join(other.stream(prompts[0], 40)) == want[0]
        assert (other.logprobs(known_text) - said[0].logprobs(known_text)).abs().max() < 2e-5


def test_int8_says_what_the_model_learnt(speaker: LanguageModel, known_text: str) -> None:
    made = LanguageModel(native(speaker.model, "int8"), speaker.tokenizer)
    assert made.generate("The naïve", 48) == speaker.generate("The naïve", 48)


def test_scoring_in_bf16_is_near(speaker: LanguageModel, known_text: str) -> None:
    scored = native(speaker.model, "int8", scoring="bf16").logprobs(speaker.encode(known_text))
    exact = speaker.logprobs(known_text)
    assert scored.shape == exact.shape and (scored - exact).abs().mean() < 0.03


def admission(speaker: LanguageModel, text: str, tokens: int, **options: float) -> Admission:
    """A text that asks for a slot."""
    generator = torch.Generator().manual_seed(0)
    return Admission(speaker.continuation(text, tokens), Sampling(**options), generator)


@pytest.mark.parametrize("place", range(3))
def test_rows_come_and_go_between_steps(speaker: LanguageModel, place: int) -> None:
    made = engines(speaker)
    if place >= len(made):
        pytest.skip("no C++ compiler here")
    batcher = Batcher(made[place], 3, 200)
    first, late = admission(speaker, "The naïve", 40), admission(speaker, "def", 20)
    drawn = admission(speaker, "A second guest", 15, temperature=1.5)
    batcher.admit([first])
    for _ in range(7):
        batcher.step()
    batcher.admit([late, drawn])
    assert batcher.free == 0
    batcher.step()
    batcher.evict(next(slot for slot, one in batcher.running.items() if one.text is drawn.text))
    again = admission(speaker, "A second guest", 15, temperature=1.5)
    batcher.admit([again])
    while batcher.running:
        batcher.step()
    assert first.text.completion().text == speaker.generate("The naïve", 40)
    assert late.text.completion().text == speaker.generate("def", 20)
    assert drawn.text.finish_reason is None and len(drawn.text.tokens) == 2
    assert again.text.tokens[:2] == drawn.text.tokens
    assert again.text.completion().text == speaker.generate(
        "A second guest", 15, temperature=1.5, seed=0
    )


@pytest.mark.parametrize("place", range(3))
def test_a_prompt_that_was_read_is_not_read_again(
    speaker: LanguageModel, known_text: str, place: int
) -> None:
    made = engines(speaker)
    if place >= len(made):
        pytest.skip("no C++ compiler here")
    batcher = Batcher(made[place], 2, 200)
    texts = [
        known_text[:90],
        known_text[:90] + known_text[90:110],
        known_text[:60] + "def",
        known_text[:90],
    ]
    for text in texts:
        new = admission(speaker, text, 12)
        batcher.admit([new])
        while batcher.running:
            batcher.step()
        assert new.text.completion().text == speaker.generate(text, 12)
    count = len(speaker.encode(texts[0]))
    assert batcher.prefix_tokens >= count + len(speaker.encode(known_text[:60])) + count - 1
