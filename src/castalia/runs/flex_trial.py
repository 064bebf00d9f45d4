"""Whether FlexAttention works on the GPU of this run, tried before the model is built."""

import torch
import torch.nn.functional as F

from castalia.core.errors import ConfigError
from castalia.core.private_cache import keep_compiled_code_private
from castalia.models.config import TransformerConfig
from castalia.models.parts import flex
from castalia.models.parts.flex import BLOCK, block_mask
from castalia.models.parts.masks import segment_mask

MOST_OFF = 0.03
"""Of the norm of a tensor: bf16 is 0.4% off, a pair that is seen by mistake several times this."""


def require_flex(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Try heads of this shape forward and backward, against torch's attention under a dense mask.

    Raises  ConfigError if FlexAttention does not run here, or gives other numbers.
    """
    keep_compiled_code_private()
    try:
        off = apart(config, device, dtype)
        why = "" if off < MOST_OFF else f"its numbers are {off:.0%} off"
    except Exception as error:  # whatever torch's compiler, Triton or the driver raise
        why = reason(error)
    if why:
        raise ConfigError(
            f"train.document_attention=flex does not work with torch {torch.__version__} on"
            f" {device}: {why}; set train.document_attention=dense"
        )


def reason(error: BaseException) -> str:
    """The first line of what the compiler's error was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def apart(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> float:
    """How far output and gradients lie from those of a dense mask in fp32, at most, as a share."""
    # Of three documents, one of which lies in both blocks.
    segments = torch.arange(2 * BLOCK, device=device)[None] // 100
    heads = config.num_attention_heads
    shape = (1, heads, 2 * BLOCK, config.head_dim)
    count = heads * 2 * BLOCK * config.head_dim
    # Not drawn: the run's generators stay where they are.
    q = torch.arange(count, device=device).sin().view(shape).to(dtype)
    k = q[:, : config.kv_heads].cos()
    given = [x.detach().requires_grad_() for x in (q, k, k.flip(2))]
    exact = [x.detach().float().requires_grad_() for x in given]
    grouped = heads != config.kv_heads
    y = flex.kernel()(*given, block_mask=block_mask(segments), enable_gqa=grouped)
    expected = F.scaled_dot_product_attention(
        exact[0], exact[1], exact[2], attn_mask=segment_mask(segments), enable_gqa=grouped
    )
    shares = [share(y, expected)]
    ours = torch.autograd.grad(y.float().square().sum(), given)
    theirs = torch.autograd.grad(expected.square().sum(), exact)
    shares += [share(*pair) for pair in zip(ours, theirs, strict=True)]
    return max(shares)


def share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm."""
    return float((ours.float() - theirs).detach().norm() / theirs.detach().norm())
