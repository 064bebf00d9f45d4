"""`Law`: loss = E + A/N^alpha + B/D^beta, or one of its two halves, with what follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Variable = Literal["parameters", "tokens"]

SYMBOLS: Mapping[Variable, tuple[str, str, str]] = {
    "parameters": ("N", "A", "alpha"),
    "tokens": ("D", "B", "beta"),
}
"""The variable, its coefficient and its exponent."""


@dataclass(frozen=True)
class Law:
    """Numbers of the law, of one fit or of a batch of them.

    Coefficients are logarithms: with a large exponent A itself does not fit into a float.
    """

    variables: tuple[Variable, ...]
    """What the loss depends on; the other term is part of E."""
    numbers: Array
    """(..., 1 + 2V): log E, then log A and alpha, log B and beta of each variable."""

    @property
    def names(self) -> list[str]:
        """Names of the numbers: E, A, alpha, B, beta."""
        return ["E", *(name for v in self.variables for name in SYMBOLS[v][1:])]

    @property
    def formula(self) -> str:
        """The law in letters."""
        terms = "".join(" + {1}/{0}^{2}".format(*SYMBOLS[v]) for v in self.variables)
        return "loss = E" + terms

    def number(self, name: str) -> Array:
        """One of its numbers, not the logarithm; inf where it is too large for a float."""
        column = self.numbers[..., self.names.index(name)]
        if name in ("alpha", "beta"):
            return column
        with np.errstate(over="ignore"):
            return np.exp(column)

    def log_number(self, name: str) -> Array:
        """The natural logarithm of E, A or B."""
        return self.numbers[..., self.names.index(name)]

    def loss(self, parameters: Array, tokens: Array) -> Array:
        """The loss at the points (S,) -> (..., S)."""
        logs = {"parameters": np.log(parameters), "tokens": np.log(tokens)}
        return np.exp(self.log_loss([logs[v] for v in self.variables]))

    def log_loss(self, logs: list[Array]) -> Array:
        """The logarithm of the loss at the logarithms (S,) of the variables -> (..., S)."""
        total = self.numbers[..., :1] + np.zeros(len(logs[0]))
        for place, values in enumerate(logs):
            coefficient = self.numbers[..., 1 + 2 * place, None]
            exponent = self.numbers[..., 2 + 2 * place, None]
            total = np.logaddexp(total, coefficient - exponent * values)
        return total

    def optimum(self, compute: Array) -> tuple[Array, Array]:
        """Parameters and tokens of the lowest loss for a budget C = 6 N D.

        compute  (K,) FLOPs.
        Shapes   -> (..., K) each. The law has both variables.
        Source   Hoffmann et al. 2022, arXiv:2203.15556, equation 4.
        """
        alpha = self.number("alpha")[..., None]
        beta = self.number("beta")[..., None]
        logs = self.log_number("A") - self.log_number("B")
        with np.errstate(all="ignore"):  # an exponent that is not positive has no optimum: NaN
            ratio = (np.log(alpha / beta) + logs[..., None]) / (alpha + beta)
            budget = np.log(compute / 6)
            parameters = np.exp(ratio + beta / (alpha + beta) * budget)
            return parameters, compute / 6 / parameters
