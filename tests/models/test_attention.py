"""Every attention kernel against scaled_dot_product_attention or plain softmax: heads, groups,
masks, biases, chunks.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.models import NeoxConfig
from castalia.models.context import Context, HeadShare
from castalia.models.parts import attention
from castalia.models.parts.attention import attend, chunks_by_kernel, split_fused
from castalia.models.parts.causal_attention import causal_attention, kept_size
from castalia.models.parts.rotary import Rope, rope_tables, rotate_heads
from castalia.models.state import KVCache, ModelState
from castalia.models.tiles import KEEP, KEEP_NUMBERS, QUERIES, keeps_probabilities

HEADS, WIDTH = 6, 16
CONFIG = NeoxConfig(
    num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, vocab_size=8, rotary_pct=0.5
)


def draw(B: int, T: int, kv_heads: int = HEADS, keys: int = 0) -> list[Tensor]:
    """q, k, v that require gradients, and a gradient of y."""
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, HEADS, T, WIDTH), *[(B, kv_heads, keys or T, WIDTH)] * 2]
    heads = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return [*heads, torch.randn(B, T, HEADS * WIDTH, generator=generator)]


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if rope is not None:
        q, k = rotate_heads(q, rope), rotate_heads(k, rope)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(2)


def by_softmax(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor) -> Tensor:
    """The definition, one line a step; visible bool and bias (…, T, keys)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * WIDTH**-0.5 + bias
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def require_same(y: Tensor, expected: Tensor, inputs: list[Tensor], dy: Tensor) -> None:
    """Values, and gradients of all inputs."""
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)
    ours = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, dy, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-5)


def documents_mask(T: int) -> Tensor:
    documents = torch.stack([torch.arange(T) * 4 // (T + 1), torch.arange(T) * 2 // (T + 1)])
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 3, 2, 1])
@pytest.mark.parametrize("T", [1, 2, 128, 129, 300])
@pytest.mark.parametrize("turned", [True, False])
def test_values_and_gradients_fp32(T: int, kv_heads: int, keep: bool, turned: bool) -> None:
    q, k, v, dy = draw(2, T, kv_heads)
    rope = None
    if turned:
        rope = rope_tables(CONFIG, torch.stack([torch.arange(T), torch.arange(T) + 7]))
    y, *_, kept = causal_attention(q, k, v, *(rope or (None, None)), None, [0], keep)
    assert kept.numel() == (kept_size(2 * HEADS, T) if keep else 0)
    require_same(y, by_torch(q, k, v, rope), [q, k, v], dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_kept_probabilities_change_no_bit(dtype: torch.dtype, masked: bool) -> None:
    """A run may keep them on one layout and compute them again on another."""
    *heads, dy = [x.detach().to(dtype) for x in draw(2, 300, 2)]
    mask = documents_mask(300) if masked else None
    results = []
    for keep in (True, False):
        inputs = [x.clone().requires_grad_() for x in heads]
        y = causal_attention(*inputs, None, None, mask, [0], keep)[0]
        results.append([y, *torch.autograd.grad(y, inputs, dy.to(dtype))])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_long_rows_against_float64(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than KEEP * WIDTH tokens, whose probabilities are kept where they are few."""
    monkeypatch.setattr(attention, "is_fused", lambda dtype, head_dim: False)
    T = KEEP * WIDTH + 200
    q, k, v, dy = draw(1, T, kv_heads)
    context = Context(positions=torch.arange(T)[None])
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = by_softmax(
        *exact_inputs, torch.ones(T, T, dtype=torch.bool).tril(), torch.zeros(T, T).double()
    )
    true = [exact, *torch.autograd.grad(exact, exact_inputs, dy.double())]
    for spares in (False, True):
        y = attend(q, k, v, context._replace(spares_memory=spares))
        assert (kept_numbers_of(y) > 0) == (not spares)
        ours = [y, *torch.autograd.grad(y, [q, k, v], dy)]
        for one, other in zip(ours, true, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5)


def kept_numbers_of(y: Tensor) -> int:
    """Probabilities that the graph of attention's result holds."""
    assert y.grad_fn is not None
    return sum(x.numel() for x in y.grad_fn.saved_tensors if x is not None and x.ndim == 1)


def test_many_long_rows_keep_nothing() -> None:
    """The limit counts a micro-batch; short rows and recomputed layers have their own rules."""
    most = KEEP_NUMBERS * 2 // (2048 + QUERIES)
    assert keeps_probabilities(most, 2048, 64, spares=False)
    assert not keeps_probabilities(most + 1, 2048, 64, spares=False)
    assert not keeps_probabilities(1, 2048, 64, spares=True)
    assert keeps_probabilities(10 * most, KEEP * 64, 64, spares=True)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_mask_hides_other_documents(kv_heads: int, keep: bool) -> None:
    q, k, v, dy = draw(2, 300, kv_heads)
    mask = documents_mask(300)
    y = causal_attention(q, k, v, None, None, mask, [0], keep)[0]
    require_same(y, by_torch(q, k, v, mask=mask), [q, k, v], dy)
    assert (y - by_torch(q, k, v)).abs().max() > 0.1


def test_bf16_rounds_little_more_than_the_kernel_that_keeps_scores_in_fp32() -> None:
    rope = rope_tables(CONFIG, torch.arange(300)[None])

    def errors(kernel, dtype: torch.dtype) -> list[Tensor]:
        *heads, dy = [x.detach().to(dtype) for x in draw(2, 300)]
        heads = [x.requires_grad_() for x in heads]
        y = kernel(*heads)
        return [
            y.detach().float(),
            *(g.float() for g in torch.autograd.grad(y, heads, dy.to(dtype))),
        ]

    exact = errors(lambda q, k, v: by_torch(q, k, v, rope), torch.float32)
    theirs = errors(lambda q, k, v: by_torch(q, k, v, rope), torch.bfloat16)
    ours = errors(
        lambda q, k, v: causal_attention(q, k, v, *rope, None, [0], True)[0], torch.bfloat16
    )
    for made_here, their, true in zip(ours, theirs, exact, strict=True):
        error, their_error = ((x - true).square().mean().sqrt() for x in (made_here, their))
        assert error <= 2 * their_error
        assert error <= 0.02 * true.square().mean().sqrt()


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_operator_is_registered_as_pytorch_wants(kv_heads: int) -> None:
    q, k, v, _ = draw(2, 130, kv_heads)
    rope = rope_tables(CONFIG, torch.arange(130)[None])
    for keep in (True, False):
        torch.library.opcheck(causal_attention, (q, k, v, *rope, None, [0], keep))


def test_a_single_token_leaves_its_input_alone() -> None:
    """A contiguous input of one token is its own contiguous copy; turning in place must not reach
    it.
    """
    fused = torch.randn(1, 1, 3 * WIDTH, generator=torch.Generator().manual_seed(1))
    before = fused.clone()
    rope = rope_tables(CONFIG, torch.tensor([[5]]))
    y = causal_attention(*split_fused(fused, WIDTH), *rope, None, [0], True)[0]
    assert torch.equal(fused, before)
    torch.testing.assert_close(y, before[..., 2 * WIDTH :])


def positions_of(starts: list[int], size: int) -> Tensor:
    return torch.cat([torch.arange(start, start + size) for start in starts])


class Chunks:
    """A rank's chunks of a row whose keys need no gathering, for one process."""

    def __init__(self, starts: list[int], k: Tensor, v: Tensor) -> None:
        self.begin = starts
        self.whole = torch.stack([k, v])

    def starts(self, T: int) -> list[int]:
        return self.begin

    def gather(self, part: Tensor, dim: int) -> Tensor:
        return self.whole


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(
    ("T", "starts"), [(12, [0, 9]), (12, [3, 6]), (560, [140, 280]), (560, [0, 420]), (8, [0])]
)
def test_chunks_of_a_row_see_what_the_whole_row_does(
    T: int, starts: list[int], kv_heads: int, masked: bool, keep: bool
) -> None:
    q, k, v, dy = draw(2, T, kv_heads)
    mask = documents_mask(T) if masked else None
    here = positions_of(starts, T // 4 if len(starts) == 2 else T)
    whole = by_torch(q, k, v, mask=mask)[:, here]
    own_mask = None if mask is None else mask[:, :, here]
    y, *_, kept = causal_attention(q[:, :, here], k, v, None, None, own_mask, starts, keep)
    assert bool(len(kept)) == keep
    by_kernel = chunks_by_kernel(q[:, :, here], k, v, own_mask, starts)
    for ours in (y, by_kernel.transpose(1, 2).flatten(2)):
        require_same(ours, whole, [q, k, v], dy[:, here])


def toy_bias(positions: Tensor, keys: int, heads: slice) -> Tensor:
    """ALiBi's form: each head's slope times the distance, for these heads."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)[heads]
    distance = torch.arange(keys) - positions[..., None]
    return slopes[None, :, None, None] * distance[:, None]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_a_bias_is_added_to_the_scores_of_a_whole_row(kv_heads: int, masked: bool) -> None:
    T = 140
    q, k, v, dy = draw(2, T, kv_heads)
    positions = torch.arange(T)[None]
    bias = toy_bias(positions, T, HeadShare().of(HEADS))
    mask = documents_mask(T) if masked else None
    y = attend(q, k, v, Context(positions, bias=bias, mask=mask))
    visible = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    require_same(y, by_softmax(q, k, v, visible, bias), [q, k, v], dy)


def test_a_bias_is_added_under_context_parallelism() -> None:
    T, starts = 16, [4, 8]
    q, k, v, dy = draw(2, T, 2)
    here = positions_of(starts, 4)
    bias = toy_bias(here[None], T, slice(None))
    visible = torch.arange(T) <= here[:, None]
    context = Context(here[None], bias=bias, share=Chunks(starts, k, v))
    y = attend(q[:, :, here], k[:, :, here], v[:, :, here], context)
    require_same(y, by_softmax(q[:, :, here], k, v, visible, bias), [q, k, v], dy[:, here])


def test_a_bias_is_added_when_generating() -> None:
    T = 9
    q, k, v, _ = draw(2, T, 2)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    whole = by_softmax(q, k, v, visible, toy_bias(torch.arange(T)[None], T, slice(None)))
    cache = KVCache((2, 2, T, WIDTH), torch.float32, "cpu")
    state = ModelState([cache], 2, T)
    pieces = []
    with torch.no_grad():
        for at, n in ((0, 4), (4, 1), (5, 3), (8, 1)):
            positions = state.positions(n)
            bias = toy_bias(positions, at + n, slice(None))
            context = Context(positions, bias=bias, mask=state.mask(n), state=cache)
            rows = slice(at, at + n)
            pieces.append(attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], context))
            state.advance(n)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.detach(), rtol=0, atol=2e-5)


def test_each_rank_makes_the_bias_of_its_own_heads() -> None:
    whole = toy_bias(torch.arange(5)[None], 5, HeadShare().of(HEADS))
    parts = [toy_bias(torch.arange(5)[None], 5, HeadShare(n, 3).of(HEADS)) for n in range(3)]
    assert torch.equal(torch.cat(parts, 1), whole)
