"""The scan of Mamba 2 by matrix products against the recurrence as it is written."""

import torch
from torch import Tensor

from castalia.recurrent.dual_scan import dual_by_token, dual_scan

SIZE, T, G, R, P, N = 2, 7, 2, 2, 3, 4
NAMES = ("x", "dt", "A", "B", "C")


def inputs() -> dict[str, Tensor]:
    """In float64, so that only a fault makes a difference."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": drawn(SIZE, T, G, R, P),
        "dt": drawn(SIZE, T, G, R).exp(),
        "A": -drawn(G, R).exp(),
        "B": drawn(SIZE, T, G, N),
        "C": drawn(SIZE, T, G, N),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def test_every_chunk_size_is_the_recurrence() -> None:
    starts = torch.tensor([[0, 0, 1, 1, 0, 0, 1], [0] * T], dtype=torch.bool)
    past = torch.ones(SIZE, G, R, P, N, dtype=torch.float64)
    weights = torch.linspace(-1, 1, SIZE * T * G * R * P, dtype=torch.float64)
    weights = weights.view(SIZE, T, G, R, P)
    for where, h in ((None, None), (starts, None), (starts, past), (None, past)):
        parts = inputs()
        y, last = dual_by_token(*parts.values(), where, h)
        expected = torch.autograd.grad((y * weights).sum(), list(parts.values()))
        for chunk in range(1, T + 2):
            made, end = dual_scan(*parts.values(), where, h, chunk)
            assert torch.allclose(made, y, rtol=0, atol=1e-12)
            assert torch.allclose(end, last, rtol=0, atol=1e-12)
            gradients = torch.autograd.grad((made * weights).sum(), list(parts.values()))
            for name, got, want in zip(NAMES, gradients, expected, strict=True):
                assert torch.allclose(got, want, rtol=1e-9, atol=1e-11), (name, chunk)


def test_long_decays_neither_overflow_nor_become_nan() -> None:
    parts = {name: x.detach().float() for name, x in inputs().items()}
    parts["dt"] = parts["dt"] * 1000
    parts = {name: x.requires_grad_() for name, x in parts.items()}
    y, _ = dual_scan(*parts.values(), chunk=T)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in parts.values())


def test_strong_decays_cost_no_digits() -> None:
    """In fp32 over a long chunk: sums of thousands, and between them gaps of hundredths."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 256, 1, 2, 3), "B": (1, 256, 1, 4), "C": (1, 256, 1, 4)}
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn = torch.rand(2, 1, 256, 1, 2, generator=generator)
    parts["dt"] = drawn[0] * torch.where(drawn[1] < 0.2, 5.0, 0.01)
    parts["A"] = torch.tensor([[-4.0, -16.0]])
    parts = {name: parts[name].requires_grad_() for name in NAMES}
    exact = {name: x.detach().double().requires_grad_() for name, x in parts.items()}
    y, _ = dual_scan(*parts.values(), chunk=256)
    want, _ = dual_by_token(*exact.values())
    got = torch.autograd.grad(y.sin().sum(), [parts[n] for n in ("x", "dt", "B", "C")])
    expected = torch.autograd.grad(want.sin().sum(), [exact[n] for n in ("x", "dt", "B", "C")])
    for ours, theirs in zip((y, *got), (want, *expected), strict=True):
        assert (ours.double() - theirs).abs().max() <= 2e-6 * theirs.abs().max()
