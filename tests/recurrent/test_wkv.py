"""The recurrences of RWKV in chunks against themselves token by token: values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.recurrent.token_shift import runs_of, token_before
from castalia.recurrent.wkv6 import wkv6, wkv6_by_token
from castalia.recurrent.wkv7 import wkv7, wkv7_by_token

B, T, H, N = 2, 21, 2, 5
RUNS = torch.tensor([[0] * 5 + [1] + [2] * 9 + [3] * 6, [0] * 21])
"""Numbers of documents; the second of the first row is a single token."""


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs6(strength: float) -> list[Tensor]:
    """r, k, v, log w, bonus and state; decays from none to exp(-exp(strength + 6)) a token."""
    r, k, v, d = (drawn(B, T, H, N, seed=seed) for seed in range(4))
    return [r, k, v, -torch.exp(3 * d + strength), drawn(H, N, seed=4), drawn(B, H, N, N, seed=5)]


def inputs7(strength: float) -> list[Tensor]:
    """r, log w, k, v, a, b and state; `strength` 9 is the strongest decay that RWKV 7 has."""
    r, d, k, v, removed, rate = (drawn(B, T, H, N, seed=seed) for seed in range(6))
    removed = F.normalize(removed, dim=-1)
    log_w = -(0.5**0.5) * torch.sigmoid(d + strength)
    rate = torch.sigmoid(rate)
    return [r, log_w, k, v, -removed, removed * rate, drawn(B, H, N, N, seed=7)]


def results(form: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], **options: Any):
    """Outputs, last state, and the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, state = form(*leaves, **options)
    ((out * drawn(*out.shape, seed=8)).sum() + (state * state).sum()).backward()
    return [out.detach(), state.detach(), *(leaf.grad for leaf in leaves)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize("strength", [-3.0, 2.0, 6.0])
@pytest.mark.parametrize("runs", [None, RUNS], ids=["one", "documents"])
def test_wkv6_in_chunks_is_the_recurrence(strength: float, runs: Tensor | None) -> None:
    inputs = inputs6(strength)
    exact = results(wkv6_by_token, [x.double() for x in inputs], runs_BT=runs)
    for chunk in (1, 2, 4, 8, 16, 32):
        found = results(wkv6, inputs, runs_BT=runs, chunk=chunk)
        assert error(found, exact) <= 1e-5, chunk


@pytest.mark.parametrize("strength", [-3.0, 9.0])
@pytest.mark.parametrize("runs", [None, RUNS], ids=["one", "documents"])
def test_wkv7_in_chunks_is_the_recurrence(strength: float, runs: Tensor | None) -> None:
    inputs = inputs7(strength)
    exact = results(wkv7_by_token, [x.double() for x in inputs], runs_BT=runs)
    for chunk in (1, 2, 3, 7, 16, 32, 64):
        found = results(wkv7, inputs, runs_BT=runs, chunk=chunk)
        assert error(found, exact) <= 1e-5, chunk


@pytest.mark.parametrize(
    ("by_token", "inputs"), [(wkv6_by_token, inputs6(0.0)), (wkv7_by_token, inputs7(0.0))]
)
def test_a_document_begins_with_an_empty_state(by_token: Any, inputs: list[Tensor]) -> None:
    whole, _ = by_token(*inputs, RUNS)
    *sequences, state = inputs
    parts = []
    for begin, end in ((5, 6), (6, 15), (15, 21)):
        part = [x[:1, begin:end] if x.dim() == 4 and x.shape[1] == T else x for x in sequences]
        parts.append(by_token(*part, torch.zeros_like(state[:1]))[0])
    assert torch.equal(whole[:1, 5:], torch.cat(parts, 1))


def test_equal_numbers_apart_are_two_documents() -> None:
    runs = runs_of(torch.tensor([[4, 4, 7, 4, 4]]))
    assert runs is not None and runs.tolist() == [[0, 0, 1, 2, 2]]
    x = torch.arange(1.0, 6)[None, :, None]
    assert token_before(x, runs).flatten().tolist() == [0, 1, 0, 0, 4]
    kept = {"shift": torch.tensor([[9.0]])}
    assert token_before(x, None, kept, "shift").flatten().tolist() == [9, 1, 2, 3, 4]
    assert kept["shift"].tolist() == [[5.0]]


def test_chunks_that_the_forms_cannot_compute() -> None:
    with pytest.raises(ConfigError, match=r"choose a power of two, not 12"):
        wkv6(*inputs6(0.0), chunk=12)
    with pytest.raises(ConfigError, match=r"have 1 to 64 tokens, not 65"):
        wkv7(*inputs7(0.0), chunk=65)
