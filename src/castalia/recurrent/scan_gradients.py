"""The autograd of a scan in chunks, whatever is computed in a chunk."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def differentiable(scan: Any, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Give the operator `scan` its gradients.

    scan      (x, dt, A, B, C, starts, h, chunk) -> outputs, states before each chunk, last state.
    backward  (gradient of the outputs, states before each chunk, x, dt, A, B, C, starts, chunk)
              -> gradients of x, dt, A, B and C.
    """

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *read, _, ctx.chunk = inputs
        # A loss of the last state is an error, not a gradient of zeros.
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[1], *read)

    def differentiate(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = backward(dy, *ctx.saved_tensors, ctx.chunk)
        return *gradients, None, None, None

    scan.register_autograd(differentiate, setup_context=remember)
