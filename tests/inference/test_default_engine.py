"""What `load` takes where no engine is named: native in the checkpoint's own numbers, or torch."""

import math
import warnings
from pathlib import Path

import pytest
import torch

import castalia
from castalia.export import export
from castalia.inference import LanguageModel, default_engine
from castalia.inference.default_engine import quicker
from castalia.inference.loading import load_exact
from castalia.inference.native_engine import NativeEngine
from castalia.native import compiled, tuning

pytestmark = pytest.mark.skipif(
    compiled.library() is None or torch.cuda.is_available(), reason="the compiled step, on a CPU"
)
PROMPTS = ["The naïve", "A second guest, who came in", "def"]


def test_the_default_writes_the_text_of_torch(
    run_folder: Path, speaker: LanguageModel, known_text: str, tmp_path: Path
) -> None:
    model = castalia.load(run_folder)
    assert (model.engine.name, model.engine.numbers) == ("native", "fp32")
    assert model.generate(PROMPTS, 30) == speaker.generate(PROMPTS, 30)
    assert (model.logprobs(known_text) - speaker.logprobs(known_text)).abs().max() < 2e-4
    # bf16 weights are held as they are, and computed with float32 activations as before.
    (done,) = export(run_folder, to="hf", dtype="bf16", output=tmp_path / "half")
    half = castalia.load(done.folder)
    assert (half.engine.name, half.engine.numbers) == ("native", "bf16")
    exact = castalia.load(done.folder, engine="torch")
    assert (half.logprobs(known_text) - exact.logprobs(known_text)).abs().max() < 2e-4
    assert half.generate(PROMPTS, 30) == exact.generate(PROMPTS, 30)
    assert castalia.load(run_folder, dtype="bf16").engine.numbers == "bf16"
    assert load_exact(run_folder).engine.name == "torch"


def test_torch_computes_the_rest(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert castalia.load(run_folder, dtype="fp16").engine.name == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(default_engine, "library", lambda: None)
        assert castalia.load(run_folder).engine.name == "torch"
        assert quicker(castalia.load(run_folder), 1) is None
    # Nobody asked for native: what it lacks is no news.
    monkeypatch.setattr(NativeEngine, "implements", {"family": ()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert castalia.load(run_folder).engine.name == "torch"


def test_a_faster_dtype_is_said_with_its_measured_factor(
    run_folder: Path, speaker: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = castalia.load(run_folder)
    # Nobody waits for the steps of a model this small.
    assert quicker(model, 1) is None
    monkeypatch.setattr(default_engine, "LEAST_WEIGHTS", 1)
    seconds = {"fp32": 3.0, "int8": 1.2}
    monkeypatch.setattr(
        default_engine, "layer_seconds", lambda shape, storage, rows, threads: seconds[storage]
    )
    assert "--dtype auto (int8)" in str(quicker(model, 1))
    assert "2.5 times as fast on this machine" in str(quicker(model, 1))
    assert quicker(speaker, 1) is None
    assert quicker(castalia.load(run_folder, dtype="fp32"), 1) is None
    seconds["int8"] = 2.9
    assert quicker(model, 1) is None


def test_a_time_is_measured_once_and_the_head_counts_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default_engine, "SECONDS", 1e-4)
    # A busy machine would measure again.
    monkeypatch.setattr(tuning, "STEADY", math.inf)
    default_engine.layer_seconds.cache_clear()
    calls = []
    measure = tuning.measured
    monkeypatch.setattr(tuning, "measured", lambda *how: calls.append(how[0]) or measure(*how))
    first = default_engine.layer_seconds((64, 32), "int8", 1, 1)
    default_engine.layer_seconds.cache_clear()
    assert default_engine.layer_seconds((64, 32), "int8", 1, 1) == first > 0
    assert calls == [(64, 32)]
    monkeypatch.setattr(default_engine, "CHANNELS_AT_MOST", 16)
    default_engine.layer_seconds.cache_clear()
    assert default_engine.layer_seconds((64, 32), "int8", 1, 1) == pytest.approx(4 * first)
    default_engine.layer_seconds.cache_clear()
