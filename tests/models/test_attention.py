"""The CPU attention operators against scaled_dot_product_attention, over several blocks of queries."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.models import ModelConfig
from castalia.models.attention import (
    attention_of_pieces,
    causal_attention,
    kept_size,
    pieces_by_kernel,
)
from castalia.models.rotary import Rope, rope_tables, split_qkv

HEADS, WIDTH = 3, 16
CONFIG = ModelConfig(
    num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, vocab_size=8, rotary_pct=0.5
)


def draw(B: int, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(B, T, 3 * HEADS * WIDTH, generator=generator).to(dtype)
    return qkv, torch.randn(B, T, HEADS * WIDTH, generator=generator).to(dtype)


def expected(
    qkv: Tensor, dy: Tensor, rope: Rope | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    heads = F.scaled_dot_product_attention(
        *split_qkv(qkv, WIDTH, rope), attn_mask=mask, is_causal=mask is None
    )
    y = heads.transpose(1, 2).flatten(2)
    return y.detach(), torch.autograd.grad(y, qkv, dy)[0]


def ours(
    qkv: Tensor, dy: Tensor, rope: Rope | None, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    y, _, kept = causal_attention(qkv, *(rope or (None, None)), mask, WIDTH, keep)
    assert kept.numel() == (kept_size(len(qkv) * HEADS, qkv.shape[1]) if keep else 0)
    return y.detach(), torch.autograd.grad(y, qkv, dy)[0]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("T", [1, 2, 128, 129, 300])
@pytest.mark.parametrize("turned", [True, False])
def test_values_and_gradients_fp32(T: int, keep: bool, turned: bool) -> None:
    qkv, dy = draw(2, T, torch.float32)
    rope = (
        rope_tables(CONFIG, torch.stack([torch.arange(T), torch.arange(T) + 7])) if turned else None
    )
    for made, wanted in zip(
        ours(qkv, dy, rope, None, keep), expected(qkv, dy, rope, None), strict=True
    ):
        torch.testing.assert_close(made, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_mask_hides_other_documents(keep: bool) -> None:
    qkv, dy = draw(2, 300, torch.float32)
    documents = torch.stack([torch.arange(300) // 90, torch.arange(300) // 170])
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    for made, wanted in zip(
        ours(qkv, dy, None, mask, keep), expected(qkv, dy, None, mask), strict=True
    ):
        torch.testing.assert_close(made, wanted, rtol=0, atol=2e-5)


def test_bf16_rounds_little_more_than_the_kernel_that_keeps_scores_in_fp32() -> None:
    qkv, dy = draw(2, 300, torch.bfloat16)
    rope = rope_tables(CONFIG, torch.arange(300)[None])
    exact = expected(qkv.float(), dy.float(), rope, None)
    theirs = expected(qkv, dy, rope, None)
    for made, their, true in zip(ours(qkv, dy, rope, None, True), theirs, exact, strict=True):
        error, their_error = (
            (x.float() - true).square().mean().sqrt().item() for x in (made, their)
        )
        assert error <= 2 * their_error
        assert error <= 0.01 * true.square().mean().sqrt().item()


def test_operator_is_registered_as_pytorch_wants() -> None:
    qkv, _ = draw(2, 130, torch.float32)
    rope = rope_tables(CONFIG, torch.arange(130)[None])
    for keep in (True, False):
        torch.library.opcheck(causal_attention, (qkv.requires_grad_(), *rope, None, WIDTH, keep))


def test_a_single_token_leaves_its_input_alone() -> None:
    one_head = torch.randn(1, 1, 3 * WIDTH, generator=torch.Generator().manual_seed(1))
    before = one_head.clone()
    y, _, _ = causal_attention(
        one_head, *rope_tables(CONFIG, torch.tensor([[5]])), None, WIDTH, True
    )
    assert torch.equal(one_head, before)
    torch.testing.assert_close(y, before[..., 2 * WIDTH :])


def pieces_of(T: int, starts: list[int], size: int) -> Tensor:
    return torch.cat([torch.arange(start, start + size) for start in starts])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("T", "starts"), [(12, [0, 9]), (12, [3, 6]), (560, [140, 280]), (560, [0, 420]), (8, [0])]
)
def test_pieces_of_a_row_see_what_the_whole_row_does(
    T: int, starts: list[int], masked: bool, keep: bool
) -> None:
    size = T // 4 if len(starts) == 2 else T
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(2, HEADS, T, WIDTH, generator=generator).requires_grad_() for _ in range(3)
    )
    documents = torch.stack([torch.arange(T) * 5 // T, torch.arange(T) * 3 // T])
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None] if masked else None
    held = pieces_of(T, starts, size)
    dy = torch.randn(2, HEADS, len(held), WIDTH, generator=generator)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[
        :, :, held
    ]
    wanted = [whole.detach(), *torch.autograd.grad(whole, (q, k, v), dy)]
    own_mask = None if mask is None else mask[:, :, held]
    by_blocks, kept = attention_of_pieces(q[:, :, held], k, v, own_mask, starts, keep)
    assert bool(len(kept)) == keep
    for y in (by_blocks, pieces_by_kernel(q[:, :, held], k, v, own_mask, starts)):
        made = [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]
        for one, other in zip(made, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_operator_of_pieces_is_registered_as_pytorch_wants() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, HEADS, n, WIDTH, generator=generator).requires_grad_() for n in (4, 8, 8)
    )
    for keep in (True, False):
        torch.library.opcheck(attention_of_pieces, (q, k, v, None, [0, 6], keep))
