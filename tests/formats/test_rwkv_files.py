"""BlinkDL's files of RWKV 6 and 7: the package rwkv computes our logits from them; both ways exact;
one sentence for each fault."""

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import castalia
from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CastaliaError, CheckpointError
from castalia.export.rwkv import RwkvFile, write_rwkv
from castalia.formats.saved_model import SavedModel, open_model
from castalia.models import Decoder, build_model_config
from castalia.models.init import start_weights

SIZES = {"num_layers": 2, "hidden_size": 32, "vocab_size": 40, "make_vocab_size_divisible_by": 1}
SECTIONS: dict[str, dict[str, Any]] = {
    "rwkv6": {"head_size": 8, "ffn_size": 48, "mix_rank": 4, "decay_rank": 5},
    "rwkv7": {
        "head_size": 8,
        "ffn_size": 48,
        "decay_rank": 4,
        "rate_rank": 5,
        "value_rank": 6,
        "gate_rank": 7,
    },
}
IDS = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(1)).tolist()


def make(family: str, **options: Any) -> Decoder:
    """A model whose start weights are disturbed, so that nothing is zero."""
    values = {"family": family, "max_position_embeddings": 4096, family: SECTIONS[family]}
    config = build_model_config(SIZES | values | options, "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


def saved(model: Decoder) -> SavedModel:
    """A model as if from a checkpoint."""
    tensors = StoredTensors(dict(model.state_dict()))
    return SavedModel(Path("."), model.config, tensors, None, None)


def write(model: Decoder, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model in a file of BlinkDL's."""
    write_rwkv(path, saved(model), dtype)
    return path


@pytest.mark.parametrize("family", SECTIONS)
def test_a_file_is_the_model_both_ways(family: str, tmp_path: Path) -> None:
    model = make(family)
    path = write(model, tmp_path / "model.pth")
    table: dict[str, Tensor] = torch.load(path, weights_only=True)
    mix = "att.time_maa_w" if family == "rwkv6" else "att.x_w"
    assert table[f"blocks.1.{mix}"].shape == (1, 1, 32)
    assert "blocks.0.ln0.weight" in table and "blocks.1.ln0.weight" not in table
    if family == "rwkv6":
        assert table["blocks.0.att.time_maa_w2"].shape == (5, 4, 32)
        assert table["blocks.0.att.time_faaaa"].shape == (4, 8)
    else:
        # As BlinkDL's files, which hold what the first layer never reads.
        table |= {f"blocks.0.att.v{i}": torch.zeros(1) for i in range(3)}
        torch.save(table, path)
    for place in (path, tmp_path):
        found = open_model(place)
        assert found.config == model.config
        assert found.tensors.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.tensors[name], tensor), name
    part = found.tensors.stored("layers.1.ffn.key.weight")[slice(3, 9), slice(0, 5)]
    assert torch.equal(part, model.state_dict()["layers.1.ffn.key.weight"][3:9, :5])
    logits = castalia.load(path).logits(IDS)
    with torch.no_grad():
        expected = model.head(model(torch.tensor([IDS])))[0]
    assert (torch.as_tensor(logits) - expected).abs().max() <= 1e-5
    # As `castalia export --to rwkv` leaves it.
    record = {"to": "rwkv", "numbers": "fp32", "model": model.config.model_dump(mode="json")}
    (tmp_path / "export.json").write_text(json.dumps(record))
    again = castalia.load(tmp_path).logits(IDS)
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(logits))
    assert open_model(write(model, path, torch.bfloat16)).tensors["norm.bias"].dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("family", SECTIONS)
def test_the_package_computes_our_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rwkv")
    # The module decides by the environment which versions it computes.
    monkeypatch.setitem(os.environ, "RWKV_JIT_ON", "0")
    monkeypatch.setitem(os.environ, "RWKV_V7_ON", str(int(family == "rwkv7")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = importlib.reload(importlib.import_module("rwkv.model"))
        model = make(family)
        path = write(model, tmp_path / "model.pth")
        peer = package.RWKV(str(path.with_suffix("")), strategy="cpu fp32")
        expected, _ = peer.forward(list(IDS), None, full_output=True)
        _, state = peer.forward(IDS[:20], None)
        step, _ = peer.forward([IDS[20]], state)
    with torch.no_grad():
        found = model.head(model(torch.tensor([IDS])))[0]
        own = model.new_state(1, 21)
        model(torch.tensor([IDS[:20]]), state=own)
        after = model.head(model(torch.tensor([[IDS[20]]]), state=own))[0, 0]
    assert (found - expected).abs().max() <= 1e-5
    assert (after - step).abs().max() <= 1e-5


class Code:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"emb.weight": Code()}, r"asks for \S*print.*nothing in it was run"),
    "no names": ({}, r"holds dict, expected tensors by name"),
    "version 4": ({"blocks.0.att.time_mix_k": torch.zeros(1)}, r"is a model of RWKV 4; .* 6 and 7"),
    "version 5": (
        {"blocks.0.att.time_mix_k": torch.zeros(1), "blocks.0.att.ln_x.weight": torch.zeros(1)},
        r"is a model of RWKV 5",
    ),
    "version 8": (
        {"blocks.0.att.r_k": torch.zeros(1), "blocks.0.ffn.s_emb.weight": torch.zeros(1)},
        r"is a preview of RWKV 8",
    ),
    "a state": ({"blocks.0.att.time_state": torch.zeros(1)}, r"is a state that was tuned"),
    "another model": ({"lm_head.weight": torch.zeros(2, 2)}, r"is not a file of RWKV"),
    "converted": ({"_strategy": "cuda fp16"}, r"_strategy is str, expected a tensor"),
    "quantized": (
        {"emb.weight": torch.zeros(2, 2, dtype=torch.uint8), "blocks.0.att.r_k": torch.zeros(1, 1)},
        r"emb\.weight is torch\.uint8 in the layout torch\.strided, expected plain floats",
    ),
    "without embedding": ({"blocks.0.att.r_k": torch.zeros(1, 1)}, r"lacks emb\.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_no_model_of_ours(fault: str, tmp_path: Path) -> None:
    content, message = FAULTS[fault]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "x.pth")


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = write(make("rwkv7"), tmp_path / "x.pth")
    table: dict[str, Tensor] = torch.load(path, weights_only=True)
    for name, tensor, message in (
        ("blocks.1.att.w1", None, r"lacks 'blocks\.1\.att\.w1'"),
        (
            "blocks.1.att.w1",
            torch.zeros(32, 9),
            r"blocks\.1\.att\.w1 is \[32, 9\], expected \[32, 4",
        ),
        (
            "blocks.0.att.more",
            torch.zeros(1),
            r"without a place in its model: 'blocks\.0\.att\.more'",
        ),
        ("emb.weight", torch.zeros(40), r"emb\.weight is \[40\], expected a matrix"),
    ):
        changed = {key: value for key, value in table.items() if key != name}
        if tensor is not None:
            changed[name] = tensor
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=message):
            open_model(path)
    torch.save(table, path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CastaliaError, match=r"x\.pth is corrupt"):
        open_model(path)


def test_what_a_file_cannot_say_is_refused() -> None:
    assert RwkvFile.refuses(make("rwkv6").config, "fp32") is None
    for options, message in (
        ({"norm": "rmsnorm"}, "assume norm=layernorm, not rmsnorm"),
        ({"layernorm_epsilon": 1e-6}, "assume layernorm_epsilon=1e-05, not 1e-06"),
        ({"rwkv6": {"head_size": 8, "norm_epsilon": 1e-5}}, "assume rwkv6.norm_epsilon=0.00064"),
        ({"output_multiplier": 2.0}, "assume output_multiplier=1.0, not 2.0"),
    ):
        assert message in str(RwkvFile.refuses(make("rwkv6", **options).config, "fp32"))
    other = build_model_config(SIZES | {"family": "neox", "num_attention_heads": 4}, "a test")
    assert "hold model.family rwkv6 and rwkv7, not neox" in str(RwkvFile.refuses(other, "fp32"))
