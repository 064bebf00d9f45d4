"""Rotary tables: values, and the rounding of GPT-NeoX v1.0."""

import math

import pytest
import torch

from castalia.models import NeoxConfig
from castalia.models.parts.attention import split_fused
from castalia.models.parts.rotary import rope_tables, rotate_heads


def config(numerics: str = "fp32") -> NeoxConfig:
    """GPT-NeoX-20B's heads: 96 wide, 24 of them turned."""
    return NeoxConfig.model_validate(
        {
            "num_layers": 1,
            "hidden_size": 192,
            "num_attention_heads": 2,
            "vocab_size": 8,
            "rope_numerics": numerics,
        }
    )


def test_tables_are_cos_and_sin_of_position_times_frequency() -> None:
    cos, sin = rope_tables(config(), torch.tensor([[0, 3, 2000]]))
    assert cos.shape == sin.shape == (1, 1, 3, 24)
    assert torch.equal(cos[..., :12], cos[..., 12:]) and torch.equal(sin[..., :12], -sin[..., 12:])
    for row, t in enumerate((0, 3, 2000)):
        for j in range(12):
            angle = t * 10000 ** (-2 * j / 24)
            assert cos[0, 0, row, 12 + j].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert sin[0, 0, row, 12 + j].item() == pytest.approx(math.sin(angle), abs=2e-4)


def test_neox_v1_rounding_has_the_published_phase_errors() -> None:
    """Largest phase error below 2048 for j = 0..5, computed from GPT-NeoX v1.0's formulas."""
    positions = torch.arange(2048)[None]
    exact, rounded = (
        rope_tables(config(numerics), positions) for numerics in ("fp32", "neox_v1_fp16")
    )
    turn = torch.complex(rounded.cos, rounded.sin) / torch.complex(exact.cos, exact.sin)
    errors = turn.angle().abs().amax(dim=(0, 1, 2)).tolist()
    # The tables themselves are rounded to 11 bits, which alone turns by up to 0.0005 rad.
    assert errors[:6] == pytest.approx([0.0, 0.34, 0.145, 0.100, 0.034, 0.018], abs=3e-3)


def test_neox_v1_tables_are_those_of_its_code() -> None:
    """RotaryEmbedding of GPT-NeoX v1.0 after .half(), line by line."""
    inv_freq = (1.0 / (10000 ** (torch.arange(0, 24, 2).float() / 24))).half()
    t = torch.arange(2048, dtype=inv_freq.dtype)
    freqs = torch.einsum("i,j->ij", t, inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = rope_tables(config("neox_v1_fp16"), torch.arange(2048)[None])
    assert torch.equal(cos[0, 0], emb.cos().float())
    # Ours has the sign of rotate_half in the table.
    assert torch.equal(sin[0, 0].abs(), emb.sin().float().abs())
    assert torch.equal(sin[0, 0, :, 12:], emb.sin().float()[:, 12:])


def test_only_the_rotary_dimensions_turn() -> None:
    qkv = torch.randn(2, 5, 2 * 3 * 96, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(config(), torch.arange(5)[None])
    q, k, v = split_fused(qkv, 96)
    q, k = rotate_heads(q, rope), rotate_heads(k, rope)
    parts = qkv.view(2, 5, 2, 3, 96).permute(3, 0, 2, 1, 4)
    assert torch.equal(v, parts[2])
    for turned, plain in ((q, parts[0]), (k, parts[1])):
        assert torch.equal(turned[..., 24:], plain[..., 24:])
        assert torch.equal(turned[:, :, 0], plain[:, :, 0])
        pairs, plain_pairs = (torch.complex(x[..., :12], x[..., 12:24]) for x in (turned, plain))
        expected = plain_pairs[:, :, 3, 1] * complex(
            math.cos(3 * 10000 ** (-1 / 12)), math.sin(3 * 10000 ** (-1 / 12))
        )
        torch.testing.assert_close(pairs[:, :, 3, 1], expected)
