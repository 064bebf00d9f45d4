"""The scan of Mamba in chunks against the recurrence as it is written, results and gradients."""

import torch
from torch import Tensor

from castalia.recurrent.selective_scan import scan_by_token, selective_scan

SIZE, T, E, N = 2, 7, 3, 4
NAMES = ("u", "dt", "A", "B", "C")


def inputs() -> dict[str, Tensor]:
    """In float64, so that only a fault makes a difference."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "u": drawn(SIZE, T, E),
        "dt": drawn(SIZE, T, E).exp(),
        "A": -drawn(E, N).exp(),
        "B": drawn(SIZE, T, N),
        "C": drawn(SIZE, T, N),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def test_every_chunk_size_is_the_recurrence() -> None:
    starts = torch.tensor([[0, 0, 1, 0, 0, 0, 1], [0] * T], dtype=torch.bool)
    past = torch.ones(SIZE, E, N, dtype=torch.float64)
    weights = torch.linspace(-1, 1, SIZE * T * E, dtype=torch.float64).view(SIZE, T, E)
    for where, h in ((None, None), (starts, None), (starts, past), (None, past)):
        parts = inputs()
        y, last = scan_by_token(*parts.values(), where, h)
        expected = torch.autograd.grad((y * weights).sum(), list(parts.values()))
        for chunk in range(1, T + 2):
            made, end = selective_scan(*parts.values(), where, h, chunk)
            assert torch.allclose(made, y, rtol=0, atol=1e-12)
            assert torch.allclose(end, last, rtol=0, atol=1e-12)
            gradients = torch.autograd.grad((made * weights).sum(), list(parts.values()))
            for name, got, want in zip(NAMES, gradients, expected, strict=True):
                assert torch.allclose(got, want, rtol=1e-10, atol=1e-12), (name, chunk)


def test_a_document_that_begins_forgets_the_state() -> None:
    starts = torch.zeros(SIZE, T, dtype=torch.bool)
    starts[:, 3] = True
    parts = inputs()
    whole, _ = selective_scan(*parts.values(), starts)
    behind, _ = selective_scan(
        *(x if name == "A" else x[:, 3:] for name, x in parts.items()),
    )
    assert torch.allclose(whole[:, 3:], behind, rtol=0, atol=1e-13)
    without, _ = selective_scan(*parts.values())
    assert not torch.allclose(without, whole, atol=1e-3)


def test_bf16_inputs_keep_the_state_in_fp32() -> None:
    parts = {name: x.detach().float() for name, x in inputs().items()}
    narrow = {n: x.bfloat16() if n in ("u", "B", "C") else x for n, x in parts.items()}
    y, last = selective_scan(*narrow.values())
    expected, _ = scan_by_token(*(x.float() for x in narrow.values()))
    assert y.dtype == last.dtype == torch.float32
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
