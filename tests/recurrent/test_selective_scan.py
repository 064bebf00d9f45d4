"""The scan of Mamba in chunks against the recurrence as it is written, results and gradients."""

import pytest
import torch
from torch import Tensor

from castalia.recurrent.compiled_scan import scan_library
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


@pytest.mark.skipif(scan_library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("sizes", [(2, 7, 3, 4), (1, 70, 35, 16), (3, 33, 64, 5)])
def test_the_compiled_scan_is_the_recurrence(sizes: tuple[int, int, int, int]) -> None:
    """In fp32, against float64: channels that fill no vector, and chunks that fill no row."""
    size, length, channels, state = sizes
    generator = torch.Generator().manual_seed(1)
    shapes = {"u": channels, "dt": channels, "B": state, "C": state}
    drawn = {name: torch.randn(size, length, n, generator=generator) for name, n in shapes.items()}
    drawn["dt"] = drawn["dt"].exp()
    A = -torch.randn(channels, state, generator=generator).exp()
    # So strong that the exponential is 0.
    A[0] = -300.0
    parts = {name: (A if name == "A" else drawn[name]).requires_grad_() for name in NAMES}
    exact = {name: x.detach().double().requires_grad_() for name, x in parts.items()}
    starts = torch.rand(size, length, generator=generator) < 0.2
    past = torch.randn(size, channels, state, generator=generator)
    weights = torch.linspace(-1, 1, size * length * channels).view(size, length, channels)
    for where, h in ((None, None), (starts, past)):
        wide = None if h is None else h.double()
        want, end = scan_by_token(*exact.values(), where, wide)
        expected = torch.autograd.grad((want * weights.double()).sum(), list(exact.values()))
        got, last = selective_scan(*parts.values(), where, h)
        assert close(got, want)
        assert close(last, end)
        gradients = torch.autograd.grad((got * weights).sum(), list(parts.values()))
        for name, ours, theirs in zip(NAMES, gradients, expected, strict=True):
            assert close(ours, theirs), name


def close(got: Tensor, want: Tensor) -> bool:
    """To the precision of fp32, as a share of the largest."""
    return bool((got.double() - want).abs().max() <= 3e-6 * want.abs().max())


@pytest.mark.skipif(scan_library() is None, reason="no C++ compiler here")
def test_without_a_compiler_torch_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: x.detach().float().requires_grad_() for name, x in inputs().items()}
    compiled, _ = selective_scan(*parts.values())
    own = torch.autograd.grad(compiled.sum(), list(parts.values()))
    monkeypatch.setattr("castalia.recurrent.selective_scan.library_for", lambda A: None)
    plain, _ = selective_scan(*parts.values())
    assert torch.allclose(plain, compiled, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain, compiled)
    gradients = torch.autograd.grad(plain.sum(), list(parts.values()))
    for ours, theirs in zip(gradients, own, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
