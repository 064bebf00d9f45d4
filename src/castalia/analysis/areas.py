"""Charts of shares that sum to 1, as inline SVG: a stacked area, or a heat map for many sources."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from castalia.analysis.svg import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    draw_axes,
    legend,
    number,
    shorten,
    svg_box,
)

Matrix = NDArray[np.float64]

FADE = (1.0, 0.6, 0.36, 0.2)
"""Opacity of a colour at its first, second, ... use, which makes 32 bands distinguishable."""
LABELLED = 0.03
"""Smallest last share of a band with room for its name beside it."""
CELL = 14
"""Height of a row of a heat map, in user units."""
LABEL_LETTERS = 13
"""Letters of a name that fit beside a row of a heat map."""
LABEL_LETTER = 7.4
"""Width of such a letter, in user units."""


def columns(steps: Sequence[int], values: Matrix, most: int) -> tuple[Matrix, Matrix]:
    """Average (S,) steps and (S, K) values over spans of equal length, to at most `most` columns.

    Shapes  -> (C,) and (C, K), C <= most.
    """
    spans = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    at = np.asarray(steps, np.float64)
    mean_steps = np.array([at[span].mean() for span in spans])
    mean_values = np.array([values[span].mean(axis=0) for span in spans])
    return mean_steps, mean_values


def stacked_area(names: Sequence[str], steps: Sequence[int], shares: Matrix, *, title: str) -> str:
    """One `<svg>` of the shares (S, K) by step, with the first source at the bottom."""
    # More columns than pixels between them would only make the page larger.
    xs, ys = columns(steps, shares, 300)
    # Rounded weights do not sum to exactly 1; dividing makes the bands fill the picture.
    tops = np.cumsum(ys, axis=1) / ys.sum(axis=1, keepdims=True)
    room = 6 + LETTER * max(len(shorten(name)) for name in names)
    x_axis = Axis(float(xs[0]), float(max(xs[-1], xs[0] + 1)), LEFT, WIDTH - RIGHT - room)
    y_axis = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    bands: list[str] = []
    low = np.zeros(len(xs))
    for i, name in enumerate(names):
        bands.append(draw_band(name, i, xs, low, tops[:, i], x_axis, y_axis))
        low = tops[:, i]
    body = draw_axes(x_axis, y_axis, "step", "weight") + "".join(bands)
    colours = [(i % COLOURS, name) for i, name in enumerate(names)]
    return svg_box(body, HEIGHT, title, legend(colours))


def draw_band(
    name: str, place: int, xs: Matrix, low: Matrix, high: Matrix, x_axis: Axis, y_axis: Axis
) -> str:
    """One source's band, with its last share on hover and its name beside it if there is room."""
    upper = [(x_axis(x), y_axis(y)) for x, y in zip(xs.tolist(), high.tolist(), strict=True)]
    lower = [(x_axis(x), y_axis(y)) for x, y in zip(xs.tolist(), low.tolist(), strict=True)]
    # A polygon: along the upper edge, and back along the lower one.
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower[::-1])
    colour = place % COLOURS
    share = float(high[-1] - low[-1])
    fade = FADE[place // COLOURS % len(FADE)]
    band = (
        f'<polygon style="fill:var(--c{colour})" fill-opacity="{fade}" class="band"'
        f' points="{path}">'
        f"<title>{escape(name)} · {share:.1%} at step {number(float(xs[-1]))}</title></polygon>"
    )
    if share < LABELLED:
        return band
    middle = y_axis(float(high[-1] + low[-1]) / 2) + 4
    label = (
        f'<text class="label" style="fill:var(--c{colour})" x="{x_axis.end + 6:.1f}"'
        f' y="{middle:.1f}">{escape(shorten(name))}</text>'
    )
    return band + label


def heat_map(
    names: Sequence[str], steps: Sequence[int], shares: Matrix, *, title: str, most: int = 60
) -> str:
    """One `<svg>` with a row per source, darker for larger shares.

    shares  (S, K). Only the `most` sources with the largest mean share are drawn.
    """
    order = np.argsort(-shares.mean(axis=0), kind="stable")[:most]
    xs, ys = columns(steps, shares[:, order], 80)
    left = LEFT + LABEL_LETTER * LABEL_LETTERS
    right = float(WIDTH - RIGHT)
    darkest = float(ys.max()) or 1.0
    rows: list[str] = []
    for row, source in enumerate(order.tolist()):
        y = TOP + row * CELL
        cells = draw_cells(names[source], xs, ys[:, row], darkest, left, right, y)
        label = f'<text class="tick" x="{left - 8}" y="{y + CELL - 4}" text-anchor="end">'
        rows.append(f'<g class="heat">{cells}</g>{label}{escape(shorten(names[source]))}</text>')

    floor = TOP + len(order) * CELL
    marks = text_below(left, floor, "start", f"step {number(float(steps[0]))}")
    marks += text_below(right, floor, "end", f"step {number(float(steps[-1]))}")
    marks += text_below((left + right) / 2, floor, "middle", f"darkest: {darkest:.2%}")
    return svg_box("".join(rows) + marks, floor + 24, title)


def draw_cells(
    name: str, xs: Matrix, shares: Matrix, darkest: float, left: float, right: float, y: float
) -> str:
    """The cells of one row of a heat map."""
    width = (right - left) / len(xs)
    cells: list[str] = []
    for i, (x, share) in enumerate(zip(xs.tolist(), shares.tolist(), strict=True)):
        # The square root shows small shares; 0.3 of overlap hides the seams between cells.
        cells.append(
            f'<rect x="{left + i * width:.1f}" y="{y}" width="{width + 0.3:.1f}"'
            f' height="{CELL - 1}" fill-opacity="{(share / darkest) ** 0.5:.3f}">'
            f"<title>{escape(name)} · step {number(x)} · {share:.2%}</title></rect>"
        )
    return "".join(cells)


def text_below(x: float, floor: float, anchor: str, text: str) -> str:
    """A text below a heat map."""
    return f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="{anchor}">{text}</text>'
