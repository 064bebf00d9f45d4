"""Causal attention of training on a CPU, in compiled code: no matrix of scores is in memory.

    s = q k^T / sqrt(D)    p = softmax(s)    y = p v
    dp = dy v^T    ds = p (dp - sum(p dp))    dv = p^T dy    dk = ds^T q    dq = ds k

The sum over keys of p dp is that over D of y dy, so a tile of scores needs nothing of the others.
The backward computes the tiles of p again, of a logarithm for each query (Dao 2023,
arXiv:2307.08691, algorithm 2): as fast as reading them back from memory, which then is linear in T.
Scores stay in fp32; p and ds are rounded to the dtype of the activations for their products.
castalia.models.parts.causal_attention has the same in torch.

Shapes: B batch, T time, H query heads, K key and value heads, D width of a head; query head h reads
key head h // (H / K).
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castalia.attention.library import attention_library


class Problem(ctypes.Structure):
    """The arguments of a call that are no tensors of heads; as in fused_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_longlong) for name in ("B", "H", "K", "T", "keys", "D", "R", "chunks")),
        *((name, ctypes.c_longlong * 3) for name in ("q_step", "k_step", "v_step")),
        ("cos_step", ctypes.c_longlong),
        ("mask_step", ctypes.c_longlong * 2),
        ("threads", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("starts", "cos", "sin", "mask")),
    ]


class Arguments:
    """A call as the library reads it; valid while this object lives.

    Raises  ValueError for a tensor of another shape or dtype than the others say: the library would
            read memory that is not the tensor's.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Tensor | None,
        starts: Sequence[int],
    ) -> None:
        B, H, T, D = q.shape
        K, keys = k.shape[1:3]
        require("k", k, (B, K, keys, D), q.dtype)
        require("v", v, (B, K, keys, D), q.dtype)
        if H % K or T % len(starts) or max(starts) + T // len(starts) > keys:
            raise ValueError(
                f"attention got {H} query heads, {K} key heads, {keys} keys and {T} queries from"
                f" {list(starts)} on: heads and queries must divide evenly, and no query may follow"
                " all keys"
            )
        self.heads = [rowwise(x) for x in (q, k, v)]
        self.starts = (ctypes.c_longlong * len(starts))(*starts)
        self.problem = Problem(B, H, K, T, keys, D, chunks=len(starts))
        for name, x in zip(("q_step", "k_step", "v_step"), self.heads, strict=True):
            setattr(self.problem, name, (ctypes.c_longlong * 3)(*x.stride()[:3]))
        self.problem.threads = torch.get_num_threads()
        self.problem.starts = ctypes.addressof(self.starts)
        self.turn(cos, sin)
        self.hide(mask)

    def turn(self, cos: Tensor | None, sin: Tensor | None) -> None:
        """Set the tables of the rotation."""
        if cos is None or sin is None:
            return
        problem = self.problem
        shape = (len(cos), 1, problem.T, cos.shape[-1])
        self.tables = [x.float().contiguous() for x in (cos, sin)]
        for name, table in zip(("cos", "sin"), self.tables, strict=True):
            require(name, table, shape, torch.float32)
            setattr(problem, name, table.data_ptr())
        if len(cos) not in (1, problem.B) or problem.keys != problem.T or shape[3] > problem.D:
            raise ValueError(
                f"attention of {problem.B} rows of {problem.T} queries and {problem.keys} keys got"
                f" a rotation of shape {shape}"
            )
        problem.R = shape[3]
        problem.cos_step = 0 if len(cos) == 1 else problem.T * problem.R

    def hide(self, mask: Tensor | None) -> None:
        """Set the mask."""
        if mask is None:
            return
        problem = self.problem
        require("mask", mask, (len(mask), 1, problem.T, problem.keys), torch.bool)
        if len(mask) not in (1, problem.B):
            raise ValueError(f"attention of {problem.B} rows got masks of {len(mask)}")
        # A window of keys is the same in every row.
        self.mask = rowwise(mask).expand(problem.B, -1, -1, -1)
        problem.mask = self.mask.data_ptr()
        problem.mask_step = (ctypes.c_longlong * 2)(self.mask.stride(0), self.mask.stride(2))


def rowwise(x: Tensor) -> Tensor:
    """x, copied unless the numbers of its last axis are neighbours."""
    if x.stride(-1) == 1:
        return x
    return x.contiguous()


def require(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises  ValueError if a tensor is not on the CPU in this shape and dtype."""
    if x.shape != shape or x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(
            f"attention got {name} of shape {tuple(x.shape)}, {x.dtype} on {x.device}, expected"
            f" {shape}, {dtype} on the CPU"
        )


def call(name: str, arguments: Arguments, *tensors: Tensor) -> None:
    """Run a function of the library on a problem and its tensors.

    Raises  MemoryError if there is no memory for packed factors.
    """
    library = attention_library()
    assert library is not None, "`fuses` is asked before"
    is_bf16 = arguments.heads[0].dtype == torch.bfloat16
    places = [x.data_ptr() for x in tensors]
    failed = getattr(library, name)(ctypes.addressof(arguments.problem), int(is_bf16), *places)
    if failed:
        B, H, T = arguments.heads[0].shape[:3]
        raise MemoryError(
            f"no memory for attention of {B} rows of {T} tokens and {H} heads; lower"
            " train.micro_batch_size or data.seq_length"
        )


def new_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous tensors in the shapes of q, k and v, not yet written."""
    # Not `empty_like`: the inputs' strides may be others than the library writes.
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("castalia::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of a row over itself, rotary embedding included, where `fuses` says so.

    q, k, v   (B, H, T, D) and twice (B, K, keys, D), H a multiple of K; views will do.
    cos, sin  as in castalia.models.parts.rotary.Rope; None where q and k are rotated already, and
              keys may exceed T.
    mask      bool (1 or B, 1, T, keys), True where a query may see a key, never a later one; None
              is causal. A query that sees no key has y = 0.
    starts    position in the row where each equal chunk of T begins, [0] for whole rows.
    Returns   y (B, T, H * D), and for the backward the rotated q, k, v, contiguous, and for each
              query log2 of the sum of its softmax, (B, H, T) fp32.
    Raises    ValueError for tensors that do not belong together.
    """
    outputs = new_outputs(q, k, v)
    y, *own, sums = outputs
    if q.numel():
        arguments = Arguments(q, k, v, cos, sin, mask, starts)
        call("castalia_attention", arguments, *arguments.heads, *own, y, sums)
    return outputs


@fused_attention.register_fake
def new_outputs(
    q: Tensor, k: Tensor, v: Tensor, *unused: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `fused_attention` returns, not yet written."""
    B, H, T, D = q.shape
    sums = q.new_empty(B, H, T, dtype=torch.float32)
    return q.new_empty(B, T, H * D), *new_gradients(q, k, v), sums


@torch.library.custom_op("castalia::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    dy: Tensor,
    y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fused_attention` with respect to q (B, H, T, D), k and v (B, K, keys, D).

    y, q, k, v and sums are the forward's own; dy (B, T, H * D).
    """
    if not q.numel():
        # Keys that nobody asks.
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    gradients = new_gradients(q, k, v)
    arguments = Arguments(q, k, v, cos, sin, mask, starts)
    B, H, T, D = q.shape
    require("dy", dy, (B, T, H * D), q.dtype)
    require("y", y, (B, T, H * D), q.dtype)
    require("sums", sums, (B, H, T), torch.float32)
    own = [x.contiguous() for x in (dy, y, q, k, v, sums)]
    call("castalia_attention_backward", arguments, *own, *gradients)
    return gradients


@fused_attention_backward.register_fake
def _(
    dy: Tensor, y: Tensor, q: Tensor, k: Tensor, v: Tensor, *unused: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_gradients(q, k, v)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward what it needs: the operator's own copies, not its inputs."""
    _, _, _, cos, sin, mask, ctx.starts = inputs
    # The inputs are views of the projection's output, three times as wide as each: saving them
    # would keep that alive beside the copies. The projection behind keeps y in any case.
    ctx.save_for_backward(*output, cos, sin, mask)
    # Else autograd makes zeros as the gradients of the copies, which nobody uses.
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward as autograd calls it; only y has a gradient."""
    dq, dk, dv = fused_attention_backward(dy, *ctx.saved_tensors, ctx.starts)
    return dq, dk, dv, None, None, None, None


fused_attention.register_autograd(differentiate, setup_context=remember)
