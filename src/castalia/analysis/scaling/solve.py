"""The fit of a law to points: Huber loss of the logarithms, from a grid of starts, with weights.

Source  Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 and appendix D.3 (the objective);
        Besiroglu et al. 2024, arXiv:2404.10102 (its sum, not its mean: an optimizer with an
        absolute tolerance stops early on the mean; intervals by bootstrap).
"""

import itertools

import numpy as np

from castalia.analysis.scaling.law import Array, Law, Variable
from castalia.analysis.scaling.minimize import Places, minimize

DELTA = 1e-3
"""Huber's delta: residuals of the logarithm beyond it, 0.1% of the loss, count linearly."""
FLOORS = (0.02, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
"""E of the starts, as parts of the smallest loss."""
EXPONENTS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2, 2.0)
"""Exponents of the starts."""
MOST_STARTS = 64
"""Starts that are minimized from: those of the grid with the lowest objective."""
ROUGH = 30
"""Rounds after which the best ones of the starts go on."""
FINISHED = 8
"""One in so many of them does, and two at least."""
STARTS_OF_A_REPLICATE = 4
"""The same for a replicate, which also starts from the fit to all points."""


class Problem:
    """Points as the fit needs them: logarithms, those of the variables around their mean."""

    def __init__(self, variables: tuple[Variable, ...], logs: list[Array], losses: Array) -> None:
        """`logs`: for each variable the (S,) logarithms; `losses`: (S,), positive."""
        self.variables = variables
        # Around the mean the coefficient and the exponent are nearly independent. With log N near
        # 20, every other exponent needs another coefficient, and the optimizer follows a ravine.
        self.means = [float(values.mean()) for values in logs]
        self.centered = [values - mean for values, mean in zip(logs, self.means, strict=True)]
        self.losses = losses
        self.target = np.log(losses)

    def law(self, centered: Array) -> Law:
        """The law of centered numbers (..., P)."""
        numbers = centered.copy()
        for place, mean in enumerate(self.means):
            numbers[..., 1 + 2 * place] += numbers[..., 2 + 2 * place] * mean
        return Law(self.variables, numbers)

    def parts(self, numbers: Array) -> tuple[Array, Array]:
        """Residuals of the logarithm, and the part of each term in the loss.

        Shapes  numbers (M, P) -> (M, S) and (1 + V, M, S).
        """
        terms = [numbers[:, :1] + np.zeros(len(self.target))]
        for place, values in enumerate(self.centered):
            exponent = numbers[:, 2 + 2 * place, None]
            terms.append(numbers[:, 1 + 2 * place, None] - exponent * values)
        stack = np.stack(terms)
        top = stack.max(axis=0)
        shares = np.exp(stack - top)
        total = shares.sum(axis=0)
        return top + np.log(total) - self.target, shares / total

    def objective(self, numbers: Array, weights: Array) -> tuple[Array, Array]:
        """The weighted sum of the Huber losses, and its gradient.

        Shapes  numbers (M, P), weights (M, S) -> (M,) and (M, P).
        """
        with np.errstate(over="ignore", invalid="ignore"):  # a trial step may be far out
            residuals, shares = self.parts(numbers)
            value = (weights * huber(residuals)).sum(axis=1)
            push = weights * np.clip(residuals, -DELTA, DELTA)
            columns = [(push * shares[0]).sum(axis=1)]
            for place, values in enumerate(self.centered):
                pull = push * shares[1 + place]
                columns += [pull.sum(axis=1), -(pull * values).sum(axis=1)]
        return np.nan_to_num(value, nan=np.inf), np.stack(columns, axis=1)

    def starts(self) -> Array:
        """A grid over E and the exponents, each with its best coefficients -> (G, P).

        The grid of the paper names the coefficients too, which presupposes the unit of the loss
        and the number of parameters; here they are those of least squares of the relative error.
        """
        axes = [EXPONENTS] * len(self.variables)
        rows = [self.start(*place) for place in itertools.product(FLOORS, *axes)]
        return np.array(rows)

    def start(self, floor: float, *exponents: float) -> list[float]:
        """One start."""
        lowest = float(self.losses.min())
        e = floor * lowest
        terms = [
            np.exp(-exponent * values) / self.losses
            for exponent, values in zip(exponents, self.centered, strict=True)
        ]
        solution, *_ = np.linalg.lstsq(np.stack(terms, 1), 1 - e / self.losses, rcond=None)
        numbers = [np.log(e)]
        for coefficient, exponent in zip(solution.tolist(), exponents, strict=True):
            # The logarithm needs a positive one; the smallest that the optimizer can still raise.
            numbers += [np.log(max(coefficient, 1e-3 * (lowest - e))), exponent]
        return numbers


def huber(residuals: Array) -> Array:
    """Huber's loss with DELTA."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, residuals**2 / 2, DELTA * (size - DELTA / 2))


def fit_law(problem: Problem, replicates: Array | None = None) -> tuple[Law, float, Law | None]:
    """Fit a law to all points, and to each replicate of a bootstrap.

    replicates  (R, S) how often each point counts in each replicate.
    Returns     the law, its objective, and the laws of the replicates as a batch.
    """
    grid = problem.starts()
    residuals, _ = problem.parts(grid)
    losses = huber(residuals)  # (G, S)
    order = np.argsort(losses.sum(axis=1), kind="stable")[:MOST_STARTS]
    ones = np.ones((1, len(problem.target)))
    centered, values = best_of(problem, grid[order][None], ones)
    law = problem.law(centered[0])
    if replicates is None or not len(replicates):
        return law, float(values[0]), None
    # The grid's losses once for all replicates, which only weigh the points differently.
    scores = replicates @ losses.T  # (R, G)
    chosen = np.argsort(scores, axis=1, kind="stable")[:, :STARTS_OF_A_REPLICATE]
    starts = grid[chosen]  # (R, K, P)
    first = np.broadcast_to(centered, (len(replicates), 1, centered.shape[1]))
    others, _ = best_of(problem, np.concatenate([first, starts], axis=1), replicates)
    return law, float(values[0]), problem.law(others)


def best_of(problem: Problem, starts: Array, weights: Array) -> tuple[Array, Array]:
    """The lowest minimum that each problem reaches from its starts.

    Shapes  starts (R, K, P), weights (R, S) -> (R, P) numbers and (R,) objectives.
    """
    count, each, width = starts.shape

    def objective(numbers: Array, problems: Places) -> tuple[Array, Array]:
        return problem.objective(numbers, weights[problems // each])

    # Some starts crawl towards infinity for hundreds of rounds. They are far behind after a few.
    rough, values = minimize(objective, starts.reshape(count * each, width), ROUGH)
    front = np.argsort(values.reshape(count, each), axis=1, kind="stable")
    front = front[:, : max(2, each // FINISHED)]
    rows = np.arange(count)[:, None]
    starts = rough.reshape(count, each, width)[rows, front]
    each = front.shape[1]
    numbers, values = minimize(objective, starts.reshape(count * each, width))
    values = values.reshape(count, each)
    best = values.argmin(axis=1)
    return numbers.reshape(count, each, width)[rows[:, 0], best], values[rows[:, 0], best]
