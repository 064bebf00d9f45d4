"""GPT-NeoX's converters and reader of arguments beside ours; GPT_NEOX names its git directory."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.test_neox_format import LLAMA, logits, saved, weights
from tests.formats.test_meta_folders import meta_weights
from tests.formats.test_meta_folders import save as save_meta
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from castalia.export import export
from castalia.formats.saved_model import open_model
from castalia.models.config import TransformerConfig
from castalia.models.families import build_model_config
from castalia.tokenizers.tokenizer import load_tokenizer

PEER = os.environ.get("GPT_NEOX", "")
pytestmark = pytest.mark.skipif(
    not PEER, reason="GPT_NEOX does not name a git directory of github.com/EleutherAI/gpt-neox"
)
FILES = ["tools/ckpts", "megatron/tokenizer", "megatron/neox_arguments"]
RUNNER = """
import importlib.machinery, json, os, runpy, sys, types
import packaging.version, torch, transformers
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

def module(name, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = made

def expand(config, layers):
    if all(isinstance(kind, str) for kind in config):
        return config
    return [kind for kinds, count in config for kind in kinds * count]

# What the scripts import of packages that need GPUs, and do not use here.
module("deepspeed")
module("deepspeed.launcher")
module("deepspeed.launcher.runner", DLTS_HOSTFILE="/none")
module("pkg_resources", packaging=packaging)
module("megatron.logging", Tee=object)
module("megatron.utils", obtain_resource_pool=None, expand_attention_types=expand)
nothing = dict.fromkeys(
    ["get_model", "get_optimizer", "get_learning_rate_scheduler", "initialize_megatron",
     "load_checkpoint", "save_checkpoint", "mpu"])
for name in ("training", "initialize", "checkpointing"):
    module("megatron." + name, **nothing)
import megatron
megatron.mpu = None
# The name of the head in the transformers that they were written for.
transformers.GPTNeoXForCausalLM.embed_out = property(lambda model: model.lm_head)
torch.cuda.device_count = lambda: 2
for call in json.loads(sys.argv[1]):
    if call["script"] == "arguments":
        from megatron.neox_arguments import NeoXArgs
        args = NeoXArgs.from_ymls(call["files"])
        print(json.dumps({name: getattr(args, name) for name in call["names"]}))
        continue
    if call["script"] == "sequential":
        found = runpy.run_path("tools/ckpts/convert_hf_to_sequential.py", run_name="script")
        model = transformers.GPTNeoXForCausalLM.from_pretrained(call["model"])
        whole = {}
        found["convert_hf_to_sequential"](model, whole)
        layers = found["shard_pp_mp"](2, whole, model.config.num_hidden_layers)
        for name, tensors in layers.items():
            torch.save(tensors, os.path.join(call["output"], name))
        continue
    sys.argv = [call["script"], *call["arguments"]]
    runpy.run_path(call["script"], run_name="__main__")
"""
NEOX = {
    "family": "neox",
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "vocab_size": 257,
    "make_vocab_size_divisible_by": 64,
    "max_position_embeddings": 64,
    "activation": "gelu",
    "rotary_pct": 0.5,
}
Run = Callable[[list[dict[str, Any]]], str]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """peer(calls): run scripts of GPT-NeoX one after the other in one process; returns stdout."""
    folder = tmp_path_factory.mktemp("peer")
    archive = subprocess.run(
        ["git", f"--git-dir={PEER}", "archive", "HEAD", *FILES], capture_output=True, check=True
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as opened:
        opened.extractall(folder, filter="data")
    (folder / "megatron" / "__init__.py").write_text("")
    (folder / "run.py").write_text(RUNNER)

    def run(calls: list[dict[str, Any]]) -> str:
        command = [sys.executable, "-W", "ignore", "run.py", json.dumps(calls)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def exported(folder: Path, values: dict[str, Any], ranks: int, stages: int) -> TransformerConfig:
    """A random model as `export --to neox` writes it, its tokenizer named by its whole path."""
    config = build_model_config(values, "test")
    assert isinstance(config, TransformerConfig)
    place = saved(folder / "checkpoints", config)
    list(
        export(
            place,
            to="neox",
            output=folder / "out",
            model_parallel_size=ranks,
            pipe_parallel_size=stages,
            certificate=False,
        )
    )
    file = folder / "out" / "global_step3" / "configs" / "model.yml"
    whole = str(folder / "out" / "tokenizer.json")
    file.write_text(file.read_text().replace("vocab_file: tokenizer.json", f"vocab_file: {whole}"))
    return config


def test_their_converter_makes_our_export_a_model_of_our_logits(peer: Run, tmp_path: Path) -> None:
    cases = {
        "neox": (NEOX, 2, 1),
        "llama": (LLAMA | {"vocab_size": 257}, 2, 0),
        "serial": (NEOX | {"parallel_residual": False}, 1, 0),
    }
    configs = {}
    calls = []
    for name, (values, ranks, stages) in cases.items():
        (tmp_path / name).mkdir()
        configs[name] = exported(tmp_path / name, values, ranks, stages)
        place = tmp_path / name / "out" / "global_step3"
        arguments = ["--input_dir", place, "--config_file", place / "configs" / "model.yml"]
        arguments += ["--output_dir", tmp_path / name / "hf", "--architecture"]
        architecture = "llama" if name == "llama" else "neox"
        calls.append(
            {
                "script": "tools/ckpts/convert_neox_to_hf.py",
                "arguments": [*map(str, arguments), architecture],
            }
        )
    peer(calls)
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "hf").eval()
        with torch.no_grad():
            theirs = model(torch.arange(24)[None] * 10).logits
        ours = logits(config, weights(config))
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max().clamp(min=1), name


def test_their_reader_accepts_our_configs(peer: Run, tmp_path: Path) -> None:
    cases = [
        (NEOX, 2, 1, {"activation": "gelu", "intermediate_size": 256}),
        (LLAMA, 2, 0, {"activation": "swiglu", "num_kv_heads": 4, "pos_emb": "rotary"}),
        (NEOX | {"pos_emb": "rpe", "norm": "scalenorm"}, 1, 2, {"rpe_num_buckets": 32}),
    ]
    calls = []
    for number, (values, ranks, stages, wanted) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        exported(tmp_path / str(number), values, ranks, stages)
        file = tmp_path / str(number) / "out" / "global_step3" / "configs" / "model.yml"
        names = [*wanted, "model_parallel_size", "pipe_parallel_size", "attention_config"]
        calls.append({"script": "arguments", "files": [str(file)], "names": names})
    lines = [line for line in peer(calls).splitlines() if line.startswith("{")]
    for line, (_, ranks, stages, wanted) in zip(lines, cases, strict=True):
        assert json.loads(line) == wanted | {
            "model_parallel_size": ranks,
            "pipe_parallel_size": stages,
            "attention_config": ["global"] * 3,
        }


def llama_peer() -> LlamaForCausalLM:
    """A model of transformers with grouped queries."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


LLAMA_YAML = """
num_layers: 2
hidden_size: 64
num_attention_heads: 8
num_kv_heads: 4
intermediate_size: 224
mlp_multiple_of: 224
max_position_embeddings: 64
seq_length: 64
activation: swiglu
norm: rmsnorm
rms_norm_epsilon: 1.0e-5
pos_emb: rotary
rotary_pct: 1
no_weight_tying: true
gpt_j_residual: false
use_bias_in_attn_linear: false
use_bias_in_mlp: false
make_vocab_size_divisible_by: 1
"""


def read_logits(path: Path, configs: list[Path]) -> Tensor:
    """Of what Castalia reads there."""
    model = open_model(path, configs=configs)
    return logits(model.config, {name: value.float() for name, value in model.tensors.items()})


def test_what_their_converters_write_is_read(peer: Run, tmp_path: Path) -> None:
    llama = llama_peer()
    llama.save_pretrained(tmp_path / "hf")
    load_tokenizer("bytes").save(tmp_path / "hf" / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf" / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path / "hf")
    # 256 ids, which two shards divide.
    whole = meta_weights(llama)
    whole["tok_embeddings.weight"] = whole["tok_embeddings.weight"][:256]
    whole["output.weight"] = whole["output.weight"][:256]
    (tmp_path / "meta").mkdir()
    save_meta(tmp_path / "meta" / "13B", whole, 2)
    torch.manual_seed(2)
    shape = {"num_hidden_layers": 2, "intermediate_size": 1024, "max_position_embeddings": 64}
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=256, hidden_size=256, num_attention_heads=4, **shape)
    ).eval()
    for weight in neox.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    neox.save_pretrained(tmp_path / "neox")
    layers = tmp_path / "layers" / "global_step0"
    layers.mkdir(parents=True)
    raw = ["--input_dir", "meta", "--model_size", "13B", "--output_dir", "raw"]
    raw += ["--num_output_shards", "2"]
    calls: list[dict[str, Any]] = [
        {
            "script": "tools/ckpts/convert_hf_llama_to_neox.py",
            "arguments": ["--tp", "1", "--model", "hf", "--model_path", "from_hf"],
        },
        {"script": "tools/ckpts/convert_raw_llama_weights_to_neox.py", "arguments": raw},
        {"script": "sequential", "model": str(tmp_path / "neox"), "output": str(layers)},
    ]
    for call in calls[:2]:
        call["arguments"] = [
            str(tmp_path / word) if word in ("hf", "from_hf", "meta", "raw") else word
            for word in call["arguments"]
        ]
    (tmp_path / "from_hf").mkdir()
    peer(calls)
    config = tmp_path / "llama.yml"
    config.write_text(LLAMA_YAML)
    ids = torch.arange(24)[None] * 10
    with torch.no_grad():
        theirs = llama(ids).logits
        theirs_neox = neox(ids).logits
    assert (read_logits(tmp_path / "from_hf", [config]) - theirs).abs().max() < 1e-5
    # LLaMA's own names, and the keys of grouped queries spread over the query heads.
    two = tmp_path / "two.yml"
    two.write_text(LLAMA_YAML + "model_parallel_size: 2\n")
    assert (read_logits(tmp_path / "raw", [two]) - theirs[..., :256]).abs().max() < 1e-5
    pythia = tmp_path / "neox.yml"
    pythia.write_text(
        "num_layers: 2\nhidden_size: 256\nnum_attention_heads: 4\nmax_position_embeddings: 64\n"
        "rotary_pct: 0.25\npos_emb: rotary\nno_weight_tying: true\ngpt_j_residual: true\n"
        "model_parallel_size: 2\nmake_vocab_size_divisible_by: 64\n"
    )
    got = read_logits(layers, [pythia])
    assert (got - theirs_neox).abs().max() < 1e-5 * theirs_neox.abs().max().clamp(min=1)
