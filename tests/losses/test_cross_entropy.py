"""The chunked loss against F.cross_entropy in float32; its bf16 error against the usual way's."""

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.data.batch import IGNORED
from castalia.losses.cross_entropy import chunk_slices, fused_cross_entropy

N, C, V = 70, 24, 301


def problem(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels with some ignored and, in rows 16 to 31, all ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator) * scale
    weight = torch.randn(V, C, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::7] = IGNORED
    labels[16:32] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses and both gradients, by whole logits in float64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    total = F.cross_entropy(h @ w.T, labels, reduction="sum", ignore_index=IGNORED)
    return total.detach(), *torch.autograd.grad(total, (h, w))


def gradients(total: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("rows", [None, 16, 17, 1, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_loss_and_gradients_equal_the_reference_in_fp32(rows: int | None, scale: float) -> None:
    hidden, weight, labels = problem(scale=scale)
    total, losses = fused_cross_entropy(hidden, weight, labels, chunk_rows=rows)
    expected, d_hidden, d_weight = reference(hidden, weight, labels)
    assert total.dtype == losses.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-6)
    made = gradients(total, hidden, weight)
    torch.testing.assert_close(
        made[0].double(), d_hidden, atol=1e-5 * max(1.0, scale / 5), rtol=1e-5
    )
    torch.testing.assert_close(
        made[1].double(), d_weight, atol=1e-5 * max(1.0, 2 * scale), rtol=1e-5
    )


def test_rows_are_the_losses_of_each_row() -> None:
    hidden, weight, labels = problem()
    losses = fused_cross_entropy(hidden, weight, labels, chunk_rows=16).rows
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-6)
    assert not losses.requires_grad
    assert (losses[labels == IGNORED] == 0).all()


def test_without_grad_the_same_losses_and_no_gradients() -> None:
    hidden, weight, labels = problem()
    with_grad = fused_cross_entropy(hidden, weight, labels, chunk_rows=16)
    with torch.no_grad():
        without = fused_cross_entropy(hidden, weight, labels, chunk_rows=16)
    assert torch.equal(with_grad.rows, without.rows)
    assert with_grad.total.requires_grad and not without.total.requires_grad


def test_gradients_scale_with_what_comes_after() -> None:
    hidden, weight, labels = problem()
    total, _ = fused_cross_entropy(hidden, weight, labels, chunk_rows=32)
    _, d_hidden, d_weight = reference(hidden, weight, labels)
    (total * 3 / 54).backward()
    torch.testing.assert_close(hidden.grad.double(), d_hidden * 3 / 54, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), d_weight * 3 / 54, atol=1e-6, rtol=1e-5)


def test_gradients_accumulate_over_calls_and_a_weight_used_twice() -> None:
    hidden, weight, labels = problem()
    _, d_hidden, d_weight = reference(hidden, weight, labels)
    for _ in range(2):
        first, second = (
            fused_cross_entropy(hidden, weight, labels, chunk_rows=16).total for _ in range(2)
        )
        (first + 2 * second).backward()
    torch.testing.assert_close(hidden.grad.double(), 6 * d_hidden, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), 6 * d_weight, atol=1e-4, rtol=1e-5)


def test_embedding_tied_to_the_head_gets_both_gradients() -> None:
    _, weight, labels = problem()
    tokens = torch.arange(N) % V
    total, _ = fused_cross_entropy(
        F.embedding(tokens, weight).tanh(), weight, labels, chunk_rows=16
    )
    usual = F.embedding(tokens, weight).tanh() @ weight.T
    expected = gradients(
        F.cross_entropy(usual, labels, reduction="sum", ignore_index=IGNORED), weight
    )[0]
    torch.testing.assert_close(gradients(total, weight)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(frozen: str) -> None:
    hidden, weight, labels = problem()
    leaves = {"hidden": hidden, "weight": weight}
    expected = dict(zip(leaves, reference(hidden, weight, labels)[1:], strict=True))
    leaves[frozen].requires_grad_(False)
    fused_cross_entropy(hidden, weight, labels).total.backward()
    free = "weight" if frozen == "hidden" else "hidden"
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[free].grad.double(), expected[free], atol=1e-5, rtol=1e-5)


def test_hidden_need_not_be_contiguous() -> None:
    hidden, weight, labels = problem()
    turned = hidden.detach().T.contiguous().T.requires_grad_()
    assert not turned.is_contiguous()
    total, _ = fused_cross_entropy(turned, weight, labels, chunk_rows=16)
    torch.testing.assert_close(
        gradients(total, turned)[0].double(),
        reference(hidden, weight, labels)[1],
        atol=1e-5,
        rtol=1e-5,
    )


def test_nothing_to_predict_is_zero_loss_and_zero_gradient() -> None:
    hidden, weight, _ = problem()
    total, losses = fused_cross_entropy(hidden, weight, torch.full((N,), IGNORED), chunk_rows=16)
    made = gradients(total, hidden, weight)
    assert float(total.detach()) == 0.0 and not losses.any()
    assert not made[0].any() and not made[1].any()
    empty, _ = fused_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    assert float(empty.detach()) == 0.0 and not gradients(empty, weight)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_error_is_no_larger_than_that_of_whole_logits(dtype: torch.dtype) -> None:
    """The usual way: logits in `dtype`, then cross-entropy in float32, as transformers does under
    autocast."""
    hidden, weight, labels = problem(seed=3)
    expected = reference(hidden, weight, labels)
    with torch.autocast("cpu", dtype):
        total, _ = fused_cross_entropy(hidden, weight, labels, chunk_rows=16)
        logits = F.linear(hidden, weight)
        usual = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
    assert total.dtype == torch.float32 and logits.dtype == dtype
    ours = (total.detach(), *gradients(total, hidden, weight))
    theirs = (usual.detach(), *gradients(usual, hidden, weight))
    assert ours[1].dtype == ours[2].dtype == torch.float32
    for made, known, exact in zip(ours, theirs, expected, strict=True):
        assert (made - exact).norm() <= 1.25 * (known - exact).norm() + 1e-3 * exact.norm()
        assert (made - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_without_autocast_keep_their_dtype(dtype: torch.dtype) -> None:
    hidden, weight, labels = (t.detach() for t in problem())
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    expected = reference(hidden, weight, labels)
    total, _ = fused_cross_entropy(hidden, weight, labels, chunk_rows=16)
    made = gradients(total, hidden, weight)
    assert made[0].dtype == made[1].dtype == dtype and total.dtype == torch.float32
    for gradient, exact in zip(made, expected[1:], strict=True):
        assert (gradient - exact).norm() <= 0.02 * exact.norm()


def test_fp16_holds_the_small_probabilities_of_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(4, 8, generator=generator),
        torch.randn(70_000, 8, generator=generator) * 0.01,
    )
    hidden, weight = hidden.half().requires_grad_(), weight.half().requires_grad_()
    labels = torch.tensor([0, 1, 2, 69_999])
    expected = reference(hidden, weight, labels)
    total, _ = fused_cross_entropy(hidden, weight, labels)
    made = gradients(total, hidden)[0]
    assert float(total.detach()) == pytest.approx(float(expected[0]), rel=1e-4)
    assert (made - expected[1]).norm() <= 0.01 * expected[1].norm()


def test_a_row_that_is_nearly_certain_keeps_its_small_gradient_in_bf16() -> None:
    hidden = torch.tensor([[8.0, 0.0]]).requires_grad_()
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = fused_cross_entropy(hidden, weight, torch.tensor([0]))
    expected = reference(hidden, weight, torch.tensor([0]))
    assert float(total.detach()) == pytest.approx(float(expected[0]), rel=1e-3)
    torch.testing.assert_close(gradients(total, hidden)[0].double(), expected[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("label", [-1, V, -101])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    hidden, weight, labels = problem()
    labels[5] = label
    with pytest.raises(
        IndexError, match=rf"label {label} of row 5 is neither -100 nor in 0\.\.300"
    ):
        fused_cross_entropy(hidden, weight, labels)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    hidden, weight, labels = problem()
    for wrong in (
        (hidden, weight[:, 1:], labels),
        (hidden, weight, labels[1:]),
        (hidden[None], weight, labels),
    ):
        with pytest.raises(
            ValueError, match=r"wants hidden \(N, C\), weight \(V, C\) and labels \(N,\)"
        ):
            fused_cross_entropy(*wrong)


def test_a_second_backward_through_one_call_is_an_error() -> None:
    hidden, weight, labels = problem()
    total, _ = fused_cross_entropy(hidden, weight, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already differentiated"):
        total.backward()


def test_another_label_can_be_the_ignored_one() -> None:
    hidden, weight, labels = problem()
    marked = labels.where(labels != IGNORED, 0)
    total, losses = fused_cross_entropy(hidden, weight, marked, ignored=0)
    expected = F.cross_entropy(hidden @ weight.T, marked, reduction="sum", ignore_index=0)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert not losses[marked == 0].any()


def test_chunks_cover_every_row_once_in_about_equal_parts() -> None:
    parts = chunk_slices(70, 16)
    assert [i for part in parts for i in range(70)[part]] == list(range(70))
    assert [part.stop - part.start for part in parts] == [14] * 5
    assert chunk_slices(0, 16) == []


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else [out]:
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_is_as_large_as_the_logits(grad: bool) -> None:
    hidden, weight, labels = problem()
    with LargestTensor() as seen, torch.set_grad_enabled(grad):
        total, _ = fused_cross_entropy(hidden, weight, labels, chunk_rows=10)
        if grad:
            total.backward()
    assert seen.elements == max(weight.numel(), 10 * V) < N * V


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gives_the_same(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem()
    made = []
    for compiled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, losses = fused_cross_entropy(
                hidden, weight, labels, chunk_rows=16, compiled=compiled
            )
        made.append((losses, *gradients(total, hidden, weight)))
    for eager, fast in zip(*made, strict=True):
        torch.testing.assert_close(
            fast, eager, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-5
        )


def row_weights(seed: int = 5) -> Tensor:
    """Weights of both signs, some 0, and NaN where the label is ignored anyway."""
    weights = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    weights[3::9] = 0.0
    weights[::7] = float("nan")
    return weights


def weighted_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the losses and both gradients, by whole logits in float64."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    rows = F.cross_entropy(h @ w.T, labels, reduction="none", ignore_index=IGNORED)
    counts = labels != IGNORED
    total = (rows[counts] * weights[counts].double()).sum()
    return total.detach(), *torch.autograd.grad(total, (h, w))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [None, 16, 1])
def test_weighted_rows_equal_the_reference(rows: int | None, compiled: bool) -> None:
    if compiled and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    hidden, weight, labels = problem()
    weights = row_weights()
    options = {"weights": weights, "chunk_rows": rows, "compiled": compiled}
    total, losses = fused_cross_entropy(hidden, weight, labels, **options)
    expected, d_hidden, d_weight = weighted_reference(hidden, weight, labels, weights)
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
    got = gradients(total, hidden, weight)
    torch.testing.assert_close(got[0].double(), d_hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double(), d_weight, atol=1e-5, rtol=1e-5)
    # The rows stay unweighted, with and without gradients.
    plain = fused_cross_entropy(hidden, weight, labels, chunk_rows=rows, compiled=compiled)
    assert torch.equal(losses, plain.rows)
    with torch.no_grad():
        again = fused_cross_entropy(hidden, weight, labels, **options)
    assert torch.equal(again.rows, losses) and torch.equal(again.total, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_rows_in_half_precision_follow_the_reference(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem()
    weights = row_weights()
    with torch.autocast("cpu", dtype):
        total, _ = fused_cross_entropy(hidden, weight, labels, weights=weights, chunk_rows=16)
    expected = weighted_reference(hidden, weight, labels, weights)
    for got, exact in zip(gradients(total, hidden, weight), expected[1:], strict=True):
        assert (got - exact).norm() <= 0.02 * exact.norm()


def test_weights_of_one_change_no_bit() -> None:
    hidden, weight, labels = problem()
    plain = fused_cross_entropy(hidden, weight, labels, chunk_rows=16)
    ones = fused_cross_entropy(hidden, weight, labels, chunk_rows=16, weights=torch.ones(N))
    assert torch.equal(plain.total, ones.total) and torch.equal(plain.rows, ones.rows)
    pairs = zip(
        gradients(plain.total, hidden, weight), gradients(ones.total, hidden, weight), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_that_do_not_fit_or_want_a_gradient_are_an_error() -> None:
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=r"weights \(70,\), one a row; got \(69,\)"):
        fused_cross_entropy(hidden, weight, labels, weights=torch.ones(N - 1))
    with pytest.raises(ValueError, match="get no gradient; detach"):
        fused_cross_entropy(hidden, weight, labels, weights=torch.ones(N, requires_grad=True))


def dpo(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (log p chosen - log p rejected - reference)); Rafailov et al. 2023, eq.
    7."""
    return -F.logsigmoid(beta * (chosen - rejected - reference)).sum()


def test_two_passes_of_the_kernel_are_the_gradient_of_a_preference_loss() -> None:
    """DPO over 5 pairs of 7 tokens each: log p without a gradient, then weights d loss / d row."""
    hidden, weight, labels = problem()
    pairs = 5
    beta = 0.3
    reference_P = torch.randn(pairs, generator=torch.Generator().manual_seed(2))

    def log_p(rows: Tensor) -> tuple[Tensor, Tensor]:
        sums = -rows.view(pairs, 2, N // pairs // 2).sum(-1)
        return sums[:, 0], sums[:, 1]

    with torch.no_grad():
        rows = fused_cross_entropy(hidden, weight, labels, chunk_rows=16).rows
    leaf = rows.clone().requires_grad_()
    loss = dpo(*log_p(leaf), reference_P, beta)
    (weights,) = torch.autograd.grad(loss, leaf)
    total, _ = fused_cross_entropy(hidden, weight, labels, weights=weights, chunk_rows=16)

    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    plain = F.cross_entropy(h @ w.T, labels, reduction="none", ignore_index=IGNORED)
    expected = dpo(*log_p(plain), reference_P.double(), beta)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    exact = torch.autograd.grad(expected, (h, w))
    for got, right in zip(gradients(total, hidden, weight), exact, strict=True):
        torch.testing.assert_close(got.double(), right, atol=1e-6, rtol=1e-5)


def test_weighted_rows_need_no_larger_tensor() -> None:
    hidden, weight, labels = problem()
    with LargestTensor() as largest:
        fused_cross_entropy(
            hidden, weight, labels, chunk_rows=10, weights=torch.ones(N)
        ).total.backward()
    assert largest.elements == max(weight.numel(), 10 * V) < N * V
