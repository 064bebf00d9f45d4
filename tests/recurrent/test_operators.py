"""What holds for all operators of castalia::… that layers with a state use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from castalia.recurrent.compiled_scan import scan_library
from castalia.recurrent.convolution import silu_of_window
from castalia.recurrent.dual_scan import dual_chunks, dual_scan
from castalia.recurrent.gated_norm import gated_norm
from castalia.recurrent.selective_scan import scan_chunks, selective_scan

S, T, E, N = 2, 7, 6, 4


def drawn(*shape: int) -> Tensor:
    """Numbers below 0, which decays must be, with a gradient."""
    return (-torch.rand(shape)).requires_grad_()


def turned(*shape: int) -> Tensor:
    """(S, T, E), in memory with the tokens last."""
    return drawn(shape[0], shape[2], shape[1]).detach().transpose(1, 2).requires_grad_()


STARTS = torch.tensor([[0, 0, 1, 0, 0, 1, 0]] * S, dtype=torch.bool)


def of_scan() -> list[Any]:
    """B, C, starts, no state before, and tokens of a chunk."""
    return [drawn(S, T, N), drawn(S, T, N), STARTS, None, 4]


def of_dual() -> list[Any]:
    """All arguments, without starts."""
    tokens = [drawn(S, T, 1, 2, 3), drawn(S, T, 1, 2), drawn(1, 2), drawn(S, T, 1, N)]
    return [*tokens, drawn(S, T, 1, N), None, drawn(S, 1, 2, 3, N).detach(), 4]


CASES: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
    "window": lambda: (silu_of_window, [turned(S, T, E), drawn(E, 3), drawn(E), STARTS.cumsum(1)]),
    "norm": lambda: (gated_norm, [turned(S, T, E), turned(S, T, E), drawn(E), 2, 1e-5]),
    "scan": lambda: (scan_chunks, [turned(S, T, E), turned(S, T, E), drawn(E, N), *of_scan()]),
    "dual": lambda: (dual_chunks, of_dual()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_graph_is_told_the_truth(name: str) -> None:
    """Shapes, dtypes and strides of outputs, and no output is an input."""
    operator, inputs = CASES[name]()
    opcheck(operator, tuple(inputs), test_utils=("test_schema", "test_faketensor"))


def test_a_gradient_of_a_gradient_or_of_a_state_is_refused() -> None:
    u, dt, A, B, C = drawn(S, T, E), drawn(S, T, E), drawn(E, N), drawn(S, T, N), drawn(S, T, N)
    y, last = selective_scan(u, dt, A, B, C)
    (du,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        du.sum().backward()
    wide = (u.unflatten(2, (1, 2, 3)), dt.unflatten(2, (1, 2, 3))[..., 0], A[None, :2, 0])
    _, dual_last = dual_scan(*wide, B[:, :, None], C[:, :, None])
    for state in (last, dual_last):
        with pytest.raises(RuntimeError, match="does not require grad"):
            state.sum().backward()


@pytest.mark.skipif(scan_library() is None, reason="no C++ compiler here")
def test_the_compiled_scan_reads_no_foreign_memory() -> None:
    parts = {"u": drawn(S, T, E), "dt": drawn(S, T, E), "A": drawn(E, N), "B": drawn(S, T, N)}
    parts |= {"C": drawn(S, T, N), "starts": STARTS, "h": drawn(S, E, N)}
    selective_scan(**parts)
    for name, tensor in parts.items():
        # u says the sizes, A that of the state.
        if name != "u":
            with pytest.raises(ValueError, match=rf"the scan of Mamba got {name} of shape"):
                selective_scan(**parts | {name: tensor[:1]})
