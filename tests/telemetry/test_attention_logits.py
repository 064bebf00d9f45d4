"""The largest logit, by blocks, against the whole matrix of scores."""

import pytest
import torch

from castalia.models.context import Context
from castalia.telemetry.attention_logits import largest_logit

B, H, K, D = 2, 4, 2, 8


def whole(q, k, seen, bias):
    """All scores at once."""
    scores = q @ k.repeat_interleave(H // K, 1).transpose(-1, -2) * D**-0.5 + bias
    return scores.masked_fill(~seen, -torch.inf).max()


@pytest.mark.parametrize("T", [1, 7, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_find_the_maximum_of_what_is_seen(T, masked):
    torch.manual_seed(T)
    q = torch.randn(B, H, T, D)
    k = torch.randn(B, K, T, D)
    seen = torch.ones(T, T, dtype=torch.bool).tril()[None, None].expand(B, 1, T, T)
    # The largest product is with a later key, which no query sees.
    k[:, :, -1] = 50 * q[:, :K, 0]
    mask = None
    if masked:
        # A window of three keys.
        seen = seen & torch.ones(T, T, dtype=torch.bool).triu(-2)
        mask = seen
    bias = torch.randn(1, H, T, T)
    context = Context(torch.arange(T)[None], mask=mask, bias=bias)
    assert float(largest_logit(q, k, context)) == pytest.approx(float(whole(q, k, seen, bias)))
