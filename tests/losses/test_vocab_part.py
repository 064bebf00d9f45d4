"""The loss over a vocabulary that several holders share, each with a thread of its own, against the
whole one.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from castalia.data.batch import IGNORED
from castalia.losses.cross_entropy import fused_cross_entropy

N, C, V = 40, 16, 96


class Meeting:
    """An all-reduce between threads."""

    def __init__(self, holders: int) -> None:
        self.barrier = threading.Barrier(holders, timeout=200)
        self.given: dict[int, Tensor] = {}

    def reduce(self, holder: int, values: Tensor, how) -> Tensor:
        """Every holder gets how(all given)."""
        self.given[holder] = values.clone()
        self.barrier.wait()
        values.copy_(how(torch.stack([self.given[key] for key in sorted(self.given)])))
        self.barrier.wait()
        return values


class Part:
    """Holder number `number` of `holders`."""

    def __init__(self, meeting: Meeting, number: int, holders: int) -> None:
        self.meeting, self.number = meeting, number
        self.first, self.count = V // holders * number, V

    def local(self, weight: Tensor) -> Tensor:
        return weight

    def sum(self, values: Tensor) -> Tensor:
        return self.meeting.reduce(self.number, values, lambda stack: stack.sum(0))

    def max(self, values: Tensor) -> Tensor:
        return self.meeting.reduce(self.number, values, lambda stack: stack.amax(0))


def shared(
    hidden: Tensor, weight: Tensor, labels: Tensor, holders: int, weights: Tensor | None = None
):
    """(total, rows, d_hidden, d_weight) out of all holders; total and rows are the same at each."""
    meeting = Meeting(holders)

    def one(number: int):
        h = hidden.detach().clone().requires_grad_()
        w = weight.detach().chunk(holders)[number].clone().requires_grad_()
        part = Part(meeting, number, holders)
        total, rows = fused_cross_entropy(h, w, labels, weights=weights, chunk_rows=16, part=part)
        total.backward()
        with torch.no_grad():
            again = fused_cross_entropy(h, w, labels, chunk_rows=16, part=part)
        assert torch.equal(again.rows, rows)
        return total.detach(), rows, h.grad, w.grad

    with ThreadPoolExecutor(holders) as pool:
        found = list(pool.map(one, range(holders)))
    assert all(torch.equal(item[1], found[0][1]) for item in found)
    return (
        found[0][0],
        found[0][1],
        sum(item[2] for item in found),
        torch.cat([item[3] for item in found]),
    )


@pytest.mark.parametrize("holders", [2, 4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_make_the_whole(holders: int, scale: float, dtype: torch.dtype) -> None:
    """At scale 60 the maxima of two holders lie hundreds apart."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, C, generator=generator) for n in (N, V))
    hidden = hidden * min(scale, 100.0)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = IGNORED
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        h @ w.T, labels, reduction="none", ignore_index=IGNORED
    )
    expected.sum().backward()
    total, rows, d_hidden, d_weight = shared(hidden, weight, labels, holders)
    close = (
        {"rtol": 1e-5, "atol": 1e-5 * max(1.0, scale)}
        if dtype == torch.float32
        else {"rtol": 0.03, "atol": 0.03}
    )
    if scale == 60.0 and dtype != torch.float32:
        close["atol"] = 4.0  # one rounding of a logit of 800
    torch.testing.assert_close(rows.double(), expected.detach(), **close)
    assert float(total) == pytest.approx(float(rows.sum()), rel=1e-6)
    if scale < 60.0 or dtype == torch.float32:
        torch.testing.assert_close(d_hidden.double(), h.grad, **close)
        torch.testing.assert_close(d_weight.double(), w.grad, **close | {"atol": close["atol"] * 4})
    assert torch.isfinite(d_hidden).all() and torch.isfinite(d_weight).all()


def test_a_label_beyond_the_whole_vocabulary_is_named() -> None:
    part = Part(Meeting(1), 0, 2)
    with pytest.raises(IndexError, match=r"label 96 of row 0 .* 0..95"):
        fused_cross_entropy(
            torch.zeros(1, C), torch.zeros(V // 2, C), torch.tensor([96]), part=part
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weighted_parts_make_the_weighted_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, C, generator=generator).to(dtype)
    weight = torch.randn(V, C, generator=generator).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = IGNORED
    weights = torch.randn(N, generator=generator)
    h = hidden.double().requires_grad_()
    w = weight.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        h @ w.T, labels, reduction="none", ignore_index=IGNORED
    )
    expected = (losses * weights).sum()
    expected.backward()
    total, rows, d_hidden, d_weight = shared(hidden, weight, labels, 4, weights)
    limit = 1e-4 if dtype == torch.float32 else 0.05
    assert float(total) == pytest.approx(expected.item(), rel=limit, abs=limit)
    torch.testing.assert_close(rows.double(), losses.detach(), rtol=limit, atol=limit)
    torch.testing.assert_close(d_hidden.double(), h.grad, rtol=limit, atol=limit)
    torch.testing.assert_close(d_weight.double(), w.grad, rtol=limit, atol=limit)
