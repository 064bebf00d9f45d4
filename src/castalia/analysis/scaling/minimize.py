"""Many small minimizations at once: BFGS over a batch of independent problems.

A fit with a bootstrap is some thousand problems of five numbers each. One after another they take
minutes; as one batch of arrays they take a second.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]
Objective = Callable[[Array, Places], tuple[Array, Array]]
"""(M, P) vectors and the (M,) problems they belong to -> (M,) values and (M, P) gradients."""

ROUNDS = 400
"""Steps of a problem at most; a fit takes 20 to 100."""
TRIALS = 40
"""Trial lengths of a step at most."""
SUFFICIENT = 1e-4
"""Part of the promised decrease that a step must bring (Armijo)."""
CURVATURE = 0.9
"""Part of the slope that may be left at its end (weak Wolfe)."""
STALL = 1e-9
"""Relative decrease below which a step counts as none."""
HOPELESS = 1e-12
"""Relative size of a promised decrease that is not worth a trial."""
PATIENCE = 3
"""Such steps in a row that end a problem."""


def minimize(objective: Objective, starts: Array, rounds: int = ROUNDS) -> tuple[Array, Array]:
    """Minimize every problem of a batch from its start.

    BFGS with a bisection line search to the weak Wolfe conditions, which also converges where the
    objective is nearly not smooth, as a Huber loss with a small delta is.

    Shapes  starts (M, P) -> (M, P) minimizers and (M,) values.
    Source  Lewis and Overton 2013, doi:10.1007/s10107-012-0514-2, algorithms 2.1 and 2.6.
    """
    problems = np.arange(len(starts))
    best = starts.copy()
    values = np.empty(len(starts))
    state = Batch(objective, starts, problems)
    for _ in range(rounds):
        state.step()
        done = state.idle >= PATIENCE
        if done.any():
            best[state.problems[done]] = state.x[done]
            values[state.problems[done]] = state.f[done]
            state.keep(~done)
        if not len(state.problems):
            break
    best[state.problems] = state.x
    values[state.problems] = state.f
    return best, values


class Batch:
    """The problems that are not finished."""

    def __init__(self, objective: Objective, starts: Array, problems: Places) -> None:
        self.objective = objective
        self.problems = problems
        self.x = starts.copy()
        self.f, self.g = objective(self.x, problems)
        count, width = starts.shape
        self.inverse = np.broadcast_to(np.eye(width), (count, width, width)).copy()
        """(M, P, P) approximations of the inverse Hessians."""
        self.fresh = np.ones(count, bool)
        """Problems whose approximation is still the identity."""
        self.idle = np.zeros(count, np.int64)
        """Steps in a row without a decrease."""

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the other problems."""
        for name in ("problems", "x", "f", "g", "inverse", "fresh", "idle"):
            setattr(self, name, getattr(self, name)[mask])

    def step(self) -> None:
        """One step of each problem."""
        direction = -np.einsum("mij,mj->mi", self.inverse, self.g)
        slope = np.einsum("mi,mi->m", direction, self.g)
        # Rounding may spoil an approximation; the gradient always leads down.
        bad = ~(slope < 0)
        self.reset(bad)
        direction[bad] = -self.g[bad]
        slope[bad] = -np.einsum("mi,mi->m", self.g[bad], self.g[bad])
        x, f, g = self.search(direction, slope)
        stalled = ~(self.f - f > STALL * np.abs(self.f))
        # Steepest descent once more before a problem counts as finished.
        self.update(x - self.x, g - self.g)
        self.reset(stalled)
        self.idle = np.where(stalled, self.idle + 1, 0)
        self.x = x
        self.f = f
        self.g = g

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Forget the curvature of some problems."""
        self.inverse[mask] = np.eye(self.x.shape[1])
        self.fresh[mask] = True

    def search(self, direction: Array, slope: Array) -> tuple[Array, Array, Array]:
        """Points along the directions that fulfil the weak Wolfe conditions, or the last ones that
        brought a sufficient decrease."""
        count = len(self.f)
        low = np.zeros(count)
        high = np.full(count, np.inf)
        # The gradient has no scale of its own: its first step is short.
        norm = np.linalg.norm(direction, axis=1)
        length = np.where(self.fresh, np.minimum(1.0, 0.1 / np.maximum(norm, 1e-300)), 1.0)
        x = self.x.copy()
        f = self.f.copy()
        g = self.g.copy()
        left = np.arange(count)
        for _ in range(TRIALS):
            trial = self.x[left] + length[left, None] * direction[left]
            value, gradient = self.objective(trial, self.problems[left])
            enough = value <= self.f[left] + SUFFICIENT * length[left] * slope[left]
            steep = np.einsum("mi,mi->m", gradient, direction[left]) < CURVATURE * slope[left]
            taken = left[enough]
            x[taken] = trial[enough]
            f[taken] = value[enough]
            g[taken] = gradient[enough]
            low[taken] = length[taken]
            high[left[~enough]] = length[left[~enough]]
            hopeful = -length[left] * slope[left] > HOPELESS * np.abs(self.f[left])
            left = left[(~enough & hopeful) | (enough & steep)]
            if not len(left):
                break
            bounded = np.isfinite(high[left])
            middle = (low[left] + np.where(bounded, high[left], 0.0)) / 2
            length[left] = np.where(bounded, middle, 2 * low[left])
        return x, f, g

    def update(self, moved: Array, turned: Array) -> None:
        """The BFGS update of the approximations."""
        product = np.einsum("mi,mi->m", moved, turned)
        size = np.einsum("mi,mi->m", turned, turned)
        # Without positive curvature the update would not stay positive definite.
        good = product > 1e-14 * np.linalg.norm(moved, axis=1) * np.sqrt(size)
        first = good & self.fresh
        scale = product[first] / size[first]
        self.inverse[first] = scale[:, None, None] * np.eye(self.x.shape[1])
        self.fresh[first] = False
        s = moved[good]
        y = turned[good]
        rho = 1 / product[good]
        inverse = self.inverse[good]
        hy = np.einsum("mij,mj->mi", inverse, y)
        factor = rho + rho**2 * np.einsum("mi,mi->m", y, hy)
        cross = np.einsum("m,mi,mj->mij", rho, s, hy)
        outer = np.einsum("m,mi,mj->mij", factor, s, s)
        self.inverse[good] = inverse + outer - cross - cross.transpose(0, 2, 1)
