"""Parameter counts of all Pythia sizes, and the FLOP formula against PyTorch's counter."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from castalia.models import Decoder, NeoxConfig, flops_per_token, parameter_counts

PYTHIA = [
    # layers, width, heads, tp degree of the padding, padded vocabulary, total, non-embedding
    (6, 128, 4, 1, 50304, 14_067_712, 1_189_888),
    (6, 256, 8, 1, 50304, 30_494_720, 4_739_072),
    (6, 512, 8, 1, 50304, 70_426_624, 18_915_328),
    (12, 768, 12, 1, 50304, 162_322_944, 85_056_000),
    (24, 1024, 16, 1, 50304, 405_334_016, 302_311_424),
    (16, 2048, 8, 1, 50304, 1_011_781_632, 805_736_448),
    (24, 2048, 16, 1, 50304, 1_414_647_808, 1_208_602_624),
    (32, 2560, 32, 1, 50304, 2_775_208_960, 2_517_652_480),
    (32, 4096, 32, 2, 50432, 6_857_302_016, 6_444_163_072),
    (36, 5120, 40, 4, 50688, 11_846_072_320, 11_327_027_200),
]


@pytest.mark.parametrize(
    ("layers", "width", "heads", "tp", "padded", "total", "non_embedding"), PYTHIA
)
def test_pythia_parameter_counts(
    layers: int, width: int, heads: int, tp: int, padded: int, total: int, non_embedding: int
) -> None:
    config = NeoxConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        vocab_size=50277,
        make_vocab_size_divisible_by=128 * tp,
    )
    assert config.padded_vocab_size == padded
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert parameter_counts(config) == (total, non_embedding)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": False}, {"mlp_bias": False}]
)
def test_counts_follow_the_options(changes: dict[str, bool]) -> None:
    config = NeoxConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=100,
        intermediate_size=80,
        **changes,
    )
    model = Decoder(config)
    outer = sum(p.numel() for name, p in model.named_parameters() if "embed" in name)
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    assert parameter_counts(config).total - parameter_counts(config).non_embedding == outer


def test_flops_equal_what_pytorch_counts() -> None:
    """On the meta device attention is two products of whole squares, as the formula has it, causal
    or not.
    """
    config = NeoxConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128)
    T = 32
    with torch.device("meta"):
        model, tokens = Decoder(config), torch.zeros(2, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.head(model(tokens)).sum().backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, T)


def test_counts_need_no_torch() -> None:
    code = (
        "import sys; from castalia.models import NeoxConfig, parameter_counts;"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
