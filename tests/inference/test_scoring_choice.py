"""How whole texts are scored: the losses of the compiled step, and the arithmetic chosen by
measurement, here by tables that are made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.test_native_families import config_of, random_model

from castalia.inference import native_engine
from castalia.inference.engine import logprobs_of
from castalia.inference.native_engine import NativeEngine
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder
from castalia.models.config import TransformerConfig
from castalia.native import tuning
from castalia.native.compiled import level, library
from castalia.native.weights import packed_weights

COMPILED = pytest.mark.skipif(library() is None, reason="needs the compiled step")


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = TransformerConfig(
        family="neox",
        vocab_size=257,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(3)
    return Decoder(config).eval().requires_grad_(False)


@pytest.fixture
def made_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """Times that stand for a measurement; a test fills them in."""
    times: dict[str, float] = {}

    def measured(shape: Any, storage: str, names: tuple[str, ...], *options: Any) -> Any:
        return tuning.Timed({name: (times[name],) for name in names}, spread=0.0)

    monkeypatch.setattr(tuning, "measured", measured)
    monkeypatch.setattr(tuning, "LEAST_WEIGHTS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.fastest.cache_clear()
    return times


def engine_of(model: Decoder, storage: str, scoring: str | None) -> NativeEngine:
    return NativeEngine(packed_weights(model.state_dict(), model.config, storage), scoring=scoring)


@COMPILED
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8", "int4"])
def test_losses_without_logits_are_those_of_the_logits(model: Decoder, storage: str) -> None:
    engine = engine_of(model, storage, None)
    generator = torch.Generator().manual_seed(1)
    # Longer than a pass, and a last pass of a few tokens.
    ids = torch.randint(0, 257, (261,), generator=generator).tolist()
    got = engine.logprobs(ids)
    assert got.shape == (260,) and got.dtype == torch.float32
    wanted = logprobs_of(engine.logits_in_parts(ids), ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert engine.logprobs(ids[:1]).shape == (0,)


@COMPILED
@pytest.mark.parametrize("case", ["llama", "mistral", "rpe"])
def test_auto_rounds_attention_alike_in_any_passes(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_model(config_of(case))
    ids = torch.randint(0, 257, (125,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = engine_of(decoder, "int8", None).logprobs(ids)
    auto = engine_of(decoder, "int8", "auto")
    assert auto.scoring == "int8"
    rounded = auto.logprobs(ids)
    assert (rounded - exact).abs().mean() < 0.01
    # Only this level has products of bfloat16, for heads of whole vectors.
    has_products = level() == "bf16" and decoder.config.head_dim % 16 == 0
    assert torch.equal(rounded, exact) != has_products
    # The queries of a text are in other groups, and the cache is the one of the text before.
    monkeypatch.setattr(native_engine, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(auto.logprobs(ids), rounded, rtol=1e-5, atol=1e-5)
    assert torch.equal(auto.logprobs(ids[:50]), auto.logprobs(ids)[:49])


@COMPILED
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("cache", ["fp32", "int8"])
def test_attention_goes_on_from_span_to_span(window: int | None, cache: str) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
    kind = {"family": "mistral", "num_kv_heads": 2, "sliding_window": window}
    decoder = random_model(
        TransformerConfig(**sizes, **kind, max_position_embeddings=1200)  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            # Scores of several units, so that the largest so far changes from span to span.
            if name.endswith(("attn.q.weight", "attn.k.weight", "attn.qkv.weight")):
                parameter *= 20
    # Spans of 512 positions: two whole ones, and some of a third.
    ids = torch.randint(0, 257, (1101,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = TorchEngine(decoder).logprobs(ids)
    engine = engine_of(decoder, "fp32", None)
    engine.use_cache(cache)
    assert (engine.logprobs(ids) - wanted).abs().mean() < {"fp32": 1e-5, "int8": 0.03}[cache]
    quantized = engine_of(decoder, "int8", None).logprobs(ids)
    auto = engine_of(decoder, "int8", "auto").logprobs(ids)
    # Beside the rounding of int8, that of attention to bfloat16 is not seen.
    assert (auto - wanted).abs().mean() < 1.1 * (quantized - wanted).abs().mean()
    assert engine.compiled is not None
    engine.compiled.rounds_scores = True
    assert (engine.logprobs(ids) - wanted).abs().mean() < 0.03


def test_scoring_takes_the_fastest_arithmetic_of_the_table(
    model: Decoder, made_table: dict[str, float]
) -> None:
    ids = list(range(40))
    made_table.update(compiled=1.0, int8_dynamic=1.0, int8_onednn=2.0, int8_weight_only=2.0)
    made_table.update(bf16=0.97, fp32=1.5, fp32_onednn=1.5)
    # Noise decides below the margin, so the storage's own arithmetic stays.
    own = engine_of(model, "int8", "auto")
    assert own.scoring == "int8" and not own.scores_apart
    found = {}
    for name, arithmetic in (("bf16", "bf16"), ("fp32_onednn", "fp32"), ("fp32", "fp32")):
        tuning.fastest.cache_clear()
        for path in Path(tuning.cache_folder()).glob("kernel-*.json"):
            path.unlink()
        made_table.update(bf16=1.2, fp32=1.5, fp32_onednn=1.5)
        made_table[name] = 0.5
        engine = engine_of(model, "int8", "auto")
        assert engine.scoring == arithmetic and engine.scorer is None
        found[name] = engine.logprobs(ids)
        # The second copy exists once a text is scored.
        assert engine.scorer is not None
        # The arithmetic that is asked for by name is never replaced.
        assert engine_of(model, "int8", None).scoring == "int8"
    torch.testing.assert_close(found["fp32"], found["fp32_onednn"], rtol=1e-4, atol=1e-5)
    assert (found["fp32"] - found["bf16"]).abs().max() < 0.05
    assert (found["fp32"] - own.logprobs(ids)).abs().max() < 0.1


def test_float32_has_a_second_copy_only_where_it_pays(
    model: Decoder, made_table: dict[str, float]
) -> None:
    made_table.update(compiled=1.2, fp32=1.0, fp32_onednn=1.0)
    if library() is not None:
        assert not engine_of(model, "fp32", None).scores_apart
    assert tuning.best_of({"a": (1.2,), "b": (1.0,)}, 1.25) == "a"
    assert tuning.best_of({"a": (1.3,), "b": (1.0,)}, 1.25) == "b"
    assert tuning.best_of({"a": (1.3, 1.0), "b": (1.0, 1.0)}, 1.25) == "a"
    exact = engine_of(model, "fp32", None).logprobs(list(range(30)))
    tuning.fastest.cache_clear()
    for path in Path(tuning.cache_folder()).glob("kernel-*.json"):
        path.unlink()
    made_table.update(compiled=3.0, fp32=2.9, fp32_onednn=1.0)
    other = engine_of(model, "fp32", None)
    assert other.scoring == "fp32"
    torch.testing.assert_close(other.logprobs(list(range(30))), exact, rtol=1e-5, atol=1e-5)
