"""The report's charts and numbers."""

import math
import re

import pytest

from dist_vse.tools.report.chart import Series, bars_figure, line_chart
from dist_vse.tools.report.numbers import figure, ordinal, short


def path_of(svg: str, style: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'class="line {style}" d="M(.*?)"', svg)
    return [(float(x), float(y)) for x, y in (point.split() for point in found.split("L"))]


def test_chart_places_points_and_marks() -> None:
    points = [(0, 0.0), (50, 100.0), (75, math.nan), (100, 50.0)]
    svg = line_chart("Recall", [Series("r1", "s1", points)], from_zero=True, x_label="steps")
    assert 'aria-label="Recall: r1 from 0 to 50"' in svg
    (x0, y0), (x1, y1), (x2, y2) = path_of(svg, "s1")  # the point that is no number is left out
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2))
    labels = re.findall(r"<text.*?>(.*?)</text>", svg)
    assert labels == ["0", "50", "100", "0", "20", "40", "60", "80", "100 steps"]


def test_chart_of_many_points_shows_their_spread() -> None:
    points = [(float(x), 5.0 + (x % 2)) for x in range(10_000)]
    svg = line_chart("Loss", [Series("loss", "s1", points)], from_zero=False, x_label="steps")
    line = path_of(svg, "s1")
    assert len(line) == 200
    assert len({y for _, y in line}) == 1  # the means of the bins
    assert 'class="band s1"' in svg
    assert len(svg) < 20_000


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0], [1e-9, 2e-9], [1e12, 2e12]])
def test_chart_of_awkward_values(values: list[float]) -> None:
    points = list(enumerate(values))
    svg = line_chart("X", [Series("x", "s1", points)], from_zero=False, x_label="steps")
    for x, y in path_of(svg, "s1"):
        assert 0 <= x <= 400
        assert 0 <= y <= 210
    assert "No finite" in line_chart(
        "X", [Series("x", "s1", [(0, math.inf)])], from_zero=True, x_label="steps"
    )


def test_numbers() -> None:
    assert [figure(x) for x in (12345.6, 193.25, 4.069, 0.0312, 3.14e-6, 0, 100.0)] == [
        *("12,346", "193.2", "4.07", "0.0312", "3.1e-06", "0", "100")
    ]
    assert [short(x) for x in (0, 250, 1500, 3e6, 0.05, 0.0005, -2000)] == [
        *("0", "250", "1.5k", "3M", "0.05", "5e-4", "-2k")
    ]
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112, 1022)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th", "1,022nd")
    ]


def test_bars_lie_side_by_side_and_a_legend_names_them() -> None:
    rows = [("one", {"a": 1.0, "b": 3.0}), ("<two>", {"b": 2.0})]
    svg = bars_figure("Seconds", rows, {"a": "c1", "b": "c2"})
    found = re.findall(r'class="bar (c\d)" x="([\d.]+)" y="(\d+)" width="([\d.]+)"', svg)
    (a, x_a, y_a, w_a), (b, x_b, y_b, w_b), (c, x_c, y_c, w_c) = found
    assert (a, b, c) == ("c1", "c2", "c2") and y_a == y_b != y_c
    assert float(x_b) == pytest.approx(float(x_a) + float(w_a)) and x_c == x_a
    assert float(w_b) == pytest.approx(3 * float(w_a))
    assert float(w_b) == pytest.approx(1.5 * float(w_c))
    assert "&lt;two&gt;" in svg and re.findall(r"</svg>(\w)</span>", svg) == ["a", "b"]
