"""Several adapters over one base on one server, and the engine that shares the base's weights."""

import pytest
import torch
from tests.fixtures.live_server import LiveServer

import castalia
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.adapted import weights_hash
from castalia.formats.additions import Addition
from castalia.formats.peft import write_peft
from castalia.formats.saved_model import open_model
from castalia.serve.model_pool import ModelPool, ServeOptions

TORCH = ServeOptions(engine="torch", dtype="fp32", slots=2)


@pytest.fixture(scope="module")
def adapters(run_folder, tmp_path_factory):
    """Folders of PEFT over the tiny run, by name: a LoRA and a DoRA adapter."""
    base = open_model(run_folder)
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for name, size in {"poet": 0.5, "coder": 1.0}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        up = torch.randn(192, 2, generator=generator) * size
        down = torch.randn(2, 64, generator=generator)
        lengths = torch.rand(192, generator=generator) + 0.5 if name == "coder" else None
        write_peft(
            folders[name],
            {"layers.1.attn.qkv": Addition(down, up, 0.7, lengths)},
            base.config,
            base.tensors,
            base_name=str(run_folder),
            base_hash=weights_hash(base),
            dropout=0.0,
            rslora=False,
            dtype=torch.float32,
        )
    return {name: str(folder) for name, folder in folders.items()}


def test_a_request_chooses_the_adapter_and_the_base_is_there_once(run_folder, adapters):
    pool = ModelPool([str(run_folder)], TORCH, adapters)
    base = pool.get(None).model.engine.model
    for name in adapters:
        engine = pool.get(name).model.engine
        assert engine.model.embed.weight.data_ptr() == base.embed.weight.data_ptr()
        there = castalia.load(adapters[name]).logits([97, 98, 99])
        torch.testing.assert_close(engine.logits([97, 98, 99]), there, rtol=0, atol=1e-5)
    # All stay in memory although one model is to be kept.
    assert len(pool.loaded) == 3
    server = LiveServer(pool)
    try:
        _, listed, _ = server.ask("/v1/models")
        assert {card["id"] for card in listed["data"]} >= {"poet", "coder", "tiny"}
        texts = []
        for name in ("tiny", *adapters):
            answer = server.complete(prompt="The naïve café", max_tokens=8, model=name)
            texts.append(answer["choices"][0]["text"])
            model = castalia.load(adapters.get(name, run_folder))
            assert texts[-1] == model.generate("The naïve café", max_new_tokens=8)
        assert len(set(texts)) == 3
        status, answer, _ = server.ask("/v1/completions", {"prompt": "a", "model": "poe"})
        assert status == 404 and "poet" in str(answer)
    finally:
        server.stop()


def test_another_engine_serves_merged_copies(run_folder, adapters):
    options = ServeOptions(engine="native", dtype="fp32", slots=2, keep=1)
    pool = ModelPool([str(run_folder)], options, {"poet": adapters["poet"]})
    try:
        assert list(pool.loaded) == ["poet"]
        there = castalia.load(adapters["poet"]).logits([97, 98, 99])
        ours = pool.get("poet").model.logits([97, 98, 99])
        torch.testing.assert_close(ours, there, rtol=0, atol=1e-3)
    finally:
        pool.close()


def test_adapters_that_fit_no_base_are_refused_at_the_start(run_folder, adapters, four_steps):
    base = str(run_folder)
    with pytest.raises(ConfigError, match="adapters belong to one base"):
        ModelPool([base, str(four_steps)], TORCH, adapters)
    with pytest.raises(ConfigError, match="the name tiny is taken"):
        ModelPool([base], TORCH, {"tiny": adapters["poet"]})
    with pytest.raises(CheckpointError, match="adapter of other weights"):
        ModelPool([f"{base}/step0"], TORCH, adapters)
