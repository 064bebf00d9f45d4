"""How whole texts are scored: the losses of the compiled step, and the arithmetic chosen by
measurement, here by tables that are made."""

from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.inference.engine import logprobs_of
from castalia.inference.native_engine import NativeEngine
from castalia.models import Decoder
from castalia.models.config import TransformerConfig
from castalia.native import tuning
from castalia.native.compiled import library
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
