"""CTranslate2 files of every family equal those of the library's own converter, byte for byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from castalia.export import export
from castalia.inference import load
from castalia.tokenizers.tokenizer import load_tokenizer

ctranslate2 = pytest.importorskip("ctranslate2")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
WIDTHS = SIZES | {"intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = WIDTHS | {"num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ENDS = {"bos_token_id": 256, "eos_token_id": 256}
GPT2 = ENDS | {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FALCON = SIZES | {"max_position_embeddings": 128}
ROTARY = {"alibi": False, "bias": False, "parallel_attn": True, "multi_query": True}
ALIBI = {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", WIDTHS | {"tie_word_embeddings": True}),
    "llama-linear": ("LlamaConfig", GROUPED | {"rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 64}),
    "mistral-2": ("MistralConfig", GROUPED | {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "gpt2": ("GPT2Config", GPT2),
    "falcon-7b": ("FalconConfig", FALCON | ROTARY),
    "falcon-rw": ("FalconConfig", FALCON | ALIBI),
}


def saved(folder: Path, kind: str, options: dict[str, Any]) -> Any:
    """A tiny model of transformers with random weights, stored with a byte tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    end = "<|endoftext|>"
    roles = {"bos_token": end, "eos_token": end, "unk_token": end}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def official(model: Any, source: Path, folder: Path, quantization: str) -> Path:
    """What the library's converter makes of a model, of which it deletes the parts."""
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        spec = _MODEL_LOADERS[type(model.config).__name__](model, tokenizer)
        spec.validate()
        spec.optimize(quantization)
    folder.mkdir()
    spec.save(str(folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_the_one_of_the_official_converter(tmp_path: Path, name: str) -> None:
    kind, options = CASES[name]
    source = tmp_path / "hf"
    model = saved(source, kind, options)
    quantization = "int8" if name == "llama" else "float32"
    theirs = official(model, source, tmp_path / "theirs", quantization)
    ours = tmp_path / "ours"
    list(export(source, to="ct2", quantization=quantization, output=ours, certificate=False))
    for file in ("model.bin", "vocabulary.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    described = json.loads((theirs / "config.json").read_text())
    # Where the converter names no epsilon, the library's default is the model's.
    described["layer_norm_epsilon"] = described["layer_norm_epsilon"] or 1e-5
    assert json.loads((ours / "config.json").read_text()) == described


def test_llama3_scaling_is_complete_where_the_official_converter_leaves_a_part_out(
    tmp_path: Path,
) -> None:
    source = tmp_path / "hf"
    model = saved(source, "LlamaConfig", GROUPED | {"rope_parameters": LLAMA3})
    list(export(source, to="ct2", quantization="float32", output=tmp_path / "ours"))
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    want = load(source).logits(ids)
    ours = load(tmp_path / "ours")
    assert (ours.logits(ids) - want).abs().max() < 1e-5
    theirs = official(model, source, tmp_path / "theirs", "float32")
    engine = ctranslate2.Generator(str(theirs), device="cpu", intra_threads=1)
    logits = np.array(engine.forward_batch([[ours.engine.vocabulary[i] for i in ids]]))[0]
    # Without the factor and the trained length all its frequencies are those of long waves.
    assert np.abs(logits - want.numpy()).max() > 0.1
