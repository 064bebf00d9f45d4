"""Intervals and tests in closed form, so that the statistics need no library beside numpy."""

import math
from collections.abc import Callable
from statistics import NormalDist

LEVEL = 0.95
"""Of every interval."""
EXPANDED_FROM = 30
"""Degrees of freedom from which Student's quantile is expanded about the normal one."""
Interval = tuple[float, float]


def binomial_interval(hits: int, rows: int, level: float = LEVEL) -> Interval | None:
    """Wilson's interval of a share; None without rows.

    Unlike the normal one it stays in [0, 1] and has a width where no row or each one is a hit.

    Source  Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    if rows < 1:
        return None
    z = normal_quantile(level)
    share = hits / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    variance = share * (1 - share) / rows + z * z / (4 * rows * rows)
    half = z * math.sqrt(variance) / (1 + z * z / rows)
    # Exactly 0 and 1 at the ends, which rounding misses.
    low = 0.0
    if hits != 0:
        low = middle - half
    high = 1.0
    if hits != rows:
        high = middle + half
    return low, high


def mean_interval(
    count: int, total: float, squares: float, level: float = LEVEL
) -> Interval | None:
    """Student's interval of a mean by count, sum and sum of squares; None for fewer than two."""
    if count < 2:
        return None
    mean = total / count
    variance = max(0.0, (squares - count * mean * mean) / (count - 1))
    half = student_quantile(count - 1, level) * math.sqrt(variance / count)
    return mean - half, mean + half


def normal_quantile(level: float = LEVEL) -> float:
    """The z with a share `level` of the normal distribution in [-z, z]."""
    return NormalDist().inv_cdf((1 + level) / 2)


def student_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t with a share `level` of Student's distribution in [-t, t].

    Source  Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, inverted; 26.7.5 from 30 degrees of
            freedom on, where its error is below 1e-6.
    """
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom}")
    if freedom >= EXPANDED_FROM:
        return expanded_quantile(freedom, normal_quantile(level))
    angle = root(lambda angle: student_share(freedom, angle) - level, 0.0, math.pi / 2)
    return math.sqrt(freedom) * math.tan(angle)


def student_share(freedom: int, angle: float) -> float:
    """The share of Student's distribution in [-t, t], with t = sqrt(freedom) tan(angle).

    Source  Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    square = math.cos(angle) ** 2
    term = 1.0
    total = 0.0
    # The odd series begins with cos, the even one with 1; both go up by cos^2.
    for k in range(2 + freedom % 2, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)


def expanded_quantile(freedom: int, z: float) -> float:
    """Student's quantile about the normal one, z.

    Source  Abramowitz and Stegun 1964, 26.7.5.
    """
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is 0, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def chi_square_shares(value: float, freedom: int) -> tuple[float, float]:
    """The shares of the chi-square distribution below and above a value.

    Source  the series and the continued fraction of the incomplete gamma function, Abramowitz and
            Stegun 1964, 6.5.29 and 6.5.31; each where it converges.
    """
    a = freedom / 2
    x = value / 2
    if x <= 0:
        return 0.0, 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        below = min(1.0, scale * gamma_series(a, x))
        return below, 1 - below
    above = min(1.0, scale * gamma_fraction(a, x))
    return 1 - above, above


def gamma_series(a: float, x: float) -> float:
    """Sum of x^n / (a (a+1) … (a+n))."""
    term = 1 / a
    total = term
    n = 0
    while abs(term) > 1e-15 * abs(total):
        n += 1
        term *= x / (a + n)
        total += term
    return total


def gamma_fraction(a: float, x: float) -> float:
    """The continued fraction 1/(x+1-a- 1(1-a)/(x+3-a- …)), by Lentz's method."""
    b = x + 1 - a
    c = math.inf
    d = 1 / b
    total = d
    n = 0
    change = 0.0
    while abs(change - 1) > 1e-14:
        n += 1
        factor = -n * (n - a)
        b += 2
        d = 1 / (factor * d + b)
        c = b + factor / c
        change = c * d
        total *= change
    return total


def poisson_shares(rate: float, largest: int) -> list[float]:
    """The probabilities of 0 … `largest` under Poisson's distribution with a positive rate."""
    return [
        math.exp(count * math.log(rate) - rate - math.lgamma(count + 1))
        for count in range(largest + 1)
    ]
