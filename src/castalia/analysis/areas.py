"""Shares that sum to 1, as a stacked area or, for many sources, as a heat map; inline SVG like `svg.py`."""

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
    number,
    shorten,
)

Matrix = NDArray[np.float64]

FADE = (1.0, 0.6, 0.36, 0.2)
"""Opacity of a colour the first time it is used, the second, ...: 32 bands can be told apart."""
LABELLED = 0.03
"""Least share at the right end of a band that carries its name there."""
CELL = 14
"""Height of a row of a heat map, in user units."""


def columns(steps: Sequence[int], values: Matrix, most: int) -> tuple[Matrix, Matrix]:
    """At most `most` columns out of (S,) steps and (S, K) values: the means over stretches of equal length."""
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    at = np.asarray(steps, np.float64)
    return np.array([at[part].mean() for part in parts]), np.array(
        [values[part].mean(axis=0) for part in parts]
    )


def stacked_area(names: Sequence[str], steps: Sequence[int], shares: Matrix, *, title: str) -> str:
    """One `<svg>`: the shares (S, K) of the sources by step, the first source at the bottom."""
    xs, ys = columns(steps, shares, 300)
    tops = np.cumsum(ys, axis=1) / ys.sum(axis=1, keepdims=True)
    room = 6 + LETTER * max(len(shorten(name)) for name in names)
    x_axis = Axis(float(xs[0]), float(max(xs[-1], xs[0] + 1)), LEFT, WIDTH - RIGHT - room)
    y_axis = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    bands = [
        draw_band(
            name, i, xs, np.zeros(len(xs)) if i == 0 else tops[:, i - 1], tops[:, i], x_axis, y_axis
        )
        for i, name in enumerate(names)
    ]
    body = draw_axes(x_axis, y_axis, "step", "weight") + "".join(bands)
    keys = "".join(
        f'<span style="color:var(--c{i % COLOURS})">{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return chart(body, HEIGHT, title, f'<p class="legend">{keys}</p>')


def draw_band(
    name: str, place: int, xs: Matrix, low: Matrix, high: Matrix, x_axis: Axis, y_axis: Axis
) -> str:
    """One source's band, with its last share on hover and its name beside it where there is room."""
    there = [(x_axis(x), y_axis(y)) for x, y in zip(xs.tolist(), high.tolist(), strict=True)]
    back = [
        (x_axis(x), y_axis(y)) for x, y in zip(xs.tolist()[::-1], low.tolist()[::-1], strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in there + back)
    colour, share = place % COLOURS, float(high[-1] - low[-1])
    fade = FADE[place // COLOURS % len(FADE)]
    out = (
        f'<polygon style="fill:var(--c{colour})" fill-opacity="{fade}" class="band" points="{path}">'
        f"<title>{escape(name)} · {share:.1%} at step {number(float(xs[-1]))}</title></polygon>"
    )
    if share < LABELLED:
        return out
    middle = y_axis(float(high[-1] + low[-1]) / 2) + 4
    return out + (
        f'<text class="label" style="fill:var(--c{colour})" x="{x_axis.end + 6:.1f}" y="{middle:.1f}">'
        f"{escape(shorten(name))}</text>"
    )


def heat_map(
    names: Sequence[str], steps: Sequence[int], shares: Matrix, *, title: str, most: int = 60
) -> str:
    """One `<svg>`: a row a source, darker where its share is larger; the `most` sources with the largest mean share."""
    order = np.argsort(-shares.mean(axis=0), kind="stable")[:most]
    xs, ys = columns(steps, shares[:, order], 80)
    left = LEFT + 7.4 * LABEL_LETTERS
    x_axis = Axis(float(xs[0]), float(max(xs[-1], xs[0] + 1)), left, WIDTH - RIGHT)
    width, top = (x_axis.end - left) / len(xs), float(ys.max()) or 1.0
    rows = []
    for row, source in enumerate(order.tolist()):
        y = TOP + row * CELL
        cells = "".join(
            f'<rect x="{left + i * width:.1f}" y="{y}" width="{width + 0.3:.1f}" height="{CELL - 1}"'
            f' fill-opacity="{(share / top) ** 0.5:.3f}"><title>{escape(names[source])} · step {number(x)} ·'
            f" {share:.2%}</title></rect>"
            for i, (x, share) in enumerate(zip(xs.tolist(), ys[:, row].tolist(), strict=True))
        )
        label = f'<text class="tick" x="{left - 8}" y="{y + CELL - 4}" text-anchor="end">'
        rows.append(f'<g class="heat">{cells}</g>{label}{escape(shorten(names[source]))}</text>')
    floor = TOP + len(order) * CELL
    ends = ((float(steps[0]), left, "start"), (float(steps[-1]), x_axis.end, "end"))
    marks = "".join(
        f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="{anchor}">step {number(value)}</text>'
        for value, x, anchor in ends
    )
    scale = f'<text class="tick" x="{(left + x_axis.end) / 2:.1f}" y="{floor + 16}" text-anchor="middle">'
    return chart("".join(rows) + f"{marks}{scale}darkest: {top:.2%}</text>", floor + 24, title)


LABEL_LETTERS = 13
"""Letters of a name that fit beside a row."""


def chart(body: str, height: float, title: str, legend: str = "") -> str:
    """The box around a picture."""
    return (
        f'<div class="chart">{legend}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg></div>"
    )
