"""Charts: places on the axes, ticks, labels, escaping."""

import math
import xml.etree.ElementTree as ET

import pytest

from castalia.analysis.svg import (
    Axis,
    Series,
    line_chart,
    linear_ticks,
    log_ticks,
    nice_step,
    number,
    shorten,
    spread,
)


def parse(chart: str) -> ET.Element:
    """The svg inside the chart's div; fails when the markup is not well formed."""
    svg = ET.fromstring(chart).find("svg")
    assert svg is not None
    return svg


def test_axis_maps_ends_and_log_gives_zero_a_place():
    axis = Axis(0, 1023, 100, 300, log=True)
    assert (axis(0), axis(1023)) == (100, 300)
    assert axis(31) == pytest.approx(200)  # log2(32) is half of log2(1024)
    assert Axis(5, 5, 0, 10)(5) == 0  # one single value does not divide by zero


@pytest.mark.parametrize(
    ("span", "count", "step"), [(1, 5, 0.2), (8.3, 6, 2), (0.004, 6, 0.001), (1000, 8, 200)]
)
def test_steps_are_round(span: float, count: int, step: float):
    assert nice_step(span, count) == pytest.approx(step)


def test_ticks():
    assert linear_ticks(2, 4, 4) == [2, 2.5, 3, 3.5, 4]
    assert log_ticks(600) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert log_ticks(143000) == [0, 1, 10, 100, 1000, 10000, 100000]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (143000, "143k"), (1.5e6, "1.5M"), (2.25, "2.25"), (3e9, "3G")],
)
def test_numbers_are_short(value: float, text: str):
    assert number(value) == text


def test_a_long_name_keeps_both_ends():
    """Eighteen letters: sources of one kind differ at their ends."""
    names = [f"the-pile-deduplicated/part-{i:02d}" for i in range(12)]
    assert {len(shorten(name)) for name in names} == {18} and len(
        {shorten(name) for name in names}
    ) == 12
    assert (
        shorten(names[7]) == "the-pile…d/part-07"
        and shorten("eighteen letters..") == "eighteen letters.."
    )


def test_labels_are_spread_in_their_order():
    assert spread([10, 11, 50], 15, 0, 100) == [10, 25, 50]
    assert spread([99, 98, 97], 15, 0, 100) == [100, 85, 70]


def test_chart_draws_each_point_where_its_values_say():
    svg = parse(
        line_chart(
            [Series("a", [(0, 1.0), (10, 3.0)]), Series("b", [(0, 2.0), (10, 2.0)])],
            x_label="step",
            y_label="y",
            title="t",
        )
    )
    lines = [line.get("points") for line in svg.iter("polyline")]
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in str(lines[0]).split())
    middle = float(str(lines[1]).split()[0].split(",")[1])
    assert x0 < x1 and y0 > y1  # y grows upwards
    assert middle == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert [title.text for title in svg.iter("title")][:2] == ["a · step 0 · 1", "a · step 10 · 3"]
    assert [t.text for t in svg.iter("text") if t.get("class") == "label"] == ["a", "b"]


def test_names_are_escaped_and_values_that_are_not_finite_left_out():
    chart = line_chart(
        [
            Series("<b>&", [(0, 1.0), (1, math.nan), (2, 2.0)]),
            Series("c", [(0, 1.5)]),
            Series("none", []),
        ],
        x_label="<x>",
        y_label="&",
        title='"quoted"',
    )
    svg = parse(chart)
    assert "<b>" not in chart and svg.get("aria-label") == '"quoted"'
    assert len(list(svg.iter("circle"))) == 3


def test_nothing_to_draw_is_no_chart():
    assert line_chart([Series("a", [(0, math.inf)])], x_label="", y_label="", title="") == ""
