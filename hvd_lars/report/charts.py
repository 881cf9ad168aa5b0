"""SVG charts to embed in a page, in the page's own colours.

Text and lines take their colours from CSS classes and variables, so that they are readable in dark
mode, too; a chart is as wide as the page and has no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hvd_lars.report.html import table

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 12, 40
_POINTS = 500  # approximate limit to which a series is thinned
_TOLD = 50  # of these, points that tell their values
_COLOURS = 10  # of page.css

# Viridis at nine points.
_RAMP = (
    "#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30",
    "#fde725",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A line: its points in order of x, and the index of one of the page's colours."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its spread from ``low`` to ``high``; dots of one name share a colour."""

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: int


def scatter_chart(
    title: str,
    dots: Sequence[Dot],
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
    log_x: bool = False,
) -> str:
    """Draw dots with their spread and a legend.

    Args:
        title: for screen readers.
        dots: their x is an index if there are ``x_names``.
        x_label: of the axis.
        y_label: of the axis.
        x_names: of an axis without an order.
        log_x: whether the x axis is logarithmic.
    """
    if not dots:
        return f'<p class="none">{escape(title)}: nothing was recorded.</p>'
    xs = [dot.x for dot in dots]
    x_axis = _Axis(min(xs), max(xs), log_x)
    if x_names:
        x_axis = _Axis(-0.5, len(x_names) - 0.5, False)
    y_axis = _Axis(min(dot.low for dot in dots), max(dot.high for dot in dots), False)
    parts = [_frame(x_axis, y_axis, x_label, y_label, x_names)]
    for dot in dots:
        x, y = _x(x_axis, dot.x), _y(y_axis, dot.y)
        if dot.high > dot.low:
            parts.append(
                f'<line class="line {_class(dot.colour)}" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{_y(y_axis, dot.low):.1f}" y2="{_y(y_axis, dot.high):.1f}"/>'
            )
        parts.append(f'<circle class="dot {_class(dot.colour)}" r="4" cx="{x:.1f}" cy="{y:.1f}"/>')
    return _svg(title, "".join(parts), _HEIGHT) + legend(
        [Series(dot.name, (), dot.colour) for dot in dots]
    )


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False
) -> str:
    """Draw lines over a common x, with a legend; drops values that are not finite (or positive).

    Args:
        title: for screen readers.
        series: the lines.
        x_label: of the axis.
        y_label: of the axis.
        log_y: whether the y axis is logarithmic; values must be positive then.
    """
    lines = [(each, _usable(_thinned(each.points), log_y)) for each in series]
    every = [point for _, points in lines for point in points]
    if not every:
        return f'<p class="none">{escape(title)}: nothing was recorded.</p>'
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_axis, y_axis = _Axis(min(xs), max(xs), False), _Axis(min(ys), max(ys), log_y)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for each, points in lines:
        path = " ".join(f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if each.dashed else ""
        parts.append(f'<polyline class="line {_class(each.colour)}"{dash} points="{path}"/>')
        shape = "dot" if len(points) == 1 else "hit"
        for x, y in _thinned(points, _TOLD):
            parts.append(
                f'<circle class="{shape} {_class(each.colour)}" r="5" '
                f'cx="{_x(x_axis, x):.1f}" cy="{_y(y_axis, y):.1f}">'
                f"<title>{escape(each.name)}: {escape(y_label)} {y:.6g} at {escape(x_label)} "
                f"{x:,.6g}</title></circle>"
            )
    shown = _svg(title, "".join(parts), _HEIGHT) + legend([each for each, _ in lines])
    return shown + _numbers(lines, x_label)


def _numbers(lines: Sequence[tuple[Series, Sequence[tuple[float, float]]]], x_label: str) -> str:
    """Return the lines as a table to unfold."""
    every = sorted({x for _, points in lines for x, _ in _thinned(points, _TOLD)})
    columns = [dict(points) for _, points in lines]
    rows = [
        [f"{x:,.6g}", *(f"{column[x]:.6g}" if x in column else "" for column in columns)]
        for x in every
        if any(x in column for column in columns)
    ]
    shown = table([x_label, *(each.name for each, _ in lines)], rows)
    return f"<details><summary>Numbers</summary>{shown}</details>"


def stacked_chart(title: str, xs: Sequence[float], parts: Mapping[str, Sequence[float]]) -> str:
    """Draw stacked areas, in milliseconds over steps."""
    if not xs:
        return f'<p class="none">{escape(title)}: nothing was recorded.</p>'
    keep = range(0, len(xs), max(1, len(xs) // _POINTS))
    totals = [0.0] * len(xs)
    layers = []
    for number, (name, values) in enumerate(parts.items()):
        below = list(totals)
        totals = [a + b for a, b in zip(totals, values, strict=True)]
        layers.append((number, name, below, list(totals)))
    x_axis, y_axis = _Axis(min(xs), max(xs), False), _Axis(0.0, max(totals), False)
    drawn = [_frame(x_axis, y_axis, "step", "ms a step")]
    for number, _, below, above in layers:
        there = [f"{_x(x_axis, xs[i]):.1f},{_y(y_axis, above[i]):.1f}" for i in keep]
        back = [f"{_x(x_axis, xs[i]):.1f},{_y(y_axis, below[i]):.1f}" for i in reversed(keep)]
        drawn.append(f'<polygon class="area {_class(number)}" points="{" ".join(there + back)}"/>')
    return _svg(title, "".join(drawn), _HEIGHT) + legend(
        [Series(name, (), number) for number, name, _, _ in layers]
    )


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]
) -> str:
    """Draw the logarithm of values[row][column] as colours; empty unless it is positive."""
    logs = [math.log10(v) for row in values for v in row if v > 0 and math.isfinite(v)]
    if not logs:
        return f'<p class="none">{escape(title)}: nothing was recorded.</p>'
    low, high = min(logs), max(logs)
    cell = 14 if len(rows) <= 40 else 7
    left, height = 190, len(rows) * cell
    width = (_WIDTH - left - _RIGHT) / len(columns)
    parts = []
    for r, row in enumerate(values):
        if cell > 10 or r % 2 == 0:
            parts.append(
                f'<text class="row" text-anchor="end" x="{left - 6}" y="{r * cell + cell - 3}">'
                f"{escape(rows[r][-30:])}</text>"
            )
        for c, value in enumerate(row):
            if value > 0 and math.isfinite(value):
                place = (math.log10(value) - low) / ((high - low) or 1.0)
                parts.append(
                    f'<rect x="{left + c * width:.1f}" y="{r * cell}" width="{width + 0.3:.1f}" '
                    f'height="{cell}" fill="{_RAMP[round(place * 8)]}"/>'
                )
    for c in range(0, len(columns), max(1, len(columns) // 8)):
        x = left + (c + 0.5) * width
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x:.0f}" y="{height + 14}">'
            f"{escape(columns[c])}</text>"
        )
    swatches = "".join(f'<i style="background:{colour}"></i>' for colour in _RAMP)
    scale = f'<p class="scale">{_number(10**low)} {swatches} {_number(10**high)} (logarithmic)</p>'
    return _svg(title, "".join(parts), height + 22) + scale


def legend(series: Sequence[Series]) -> str:
    """Return a list of names and their colours, each name once."""
    items = "".join(
        f'<li><i class="key {_class(each.colour)}{" dashed" if each.dashed else ""}"></i>'
        f"{escape(name)}</li>"
        for name, each in {each.name: each for each in series}.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _class(colour: int) -> str:
    return f"c{colour % _COLOURS}"


class _Axis:
    """A range; maps values to 0 to 1, and gives round numbers in it."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.log = low, high, log

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log and self.high / self.low >= 10:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            if last - first < 2:  # less than two decades: 1, 2 and 5 times the powers of ten
                steps = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
                return [value for value in steps if self.low <= value <= self.high]
            return [10.0**e for e in range(first, last + 1, max(1, (last - first) // 5))]
        raw = (self.high - self.low) / 5
        unit: float = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [(first + i) * step for i in range(count + 1)]


def _frame(
    x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, x_names: Sequence[str] = ()
) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>']
    for value in y_axis.ticks():
        y = _y(y_axis, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">'
            f"{_number(value)}</text>"
        )
    named = [(float(place), name) for place, name in enumerate(x_names)]
    ticks = named or [(value, _number(value)) for value in x_axis.ticks()]
    for value, text in ticks:
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{_x(x_axis, value):.1f}" '
            f'y="{bottom + 16}">{escape(text)}</text>'
        )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" x="{(_LEFT + right) / 2}" '
        f'y="{_HEIGHT - 6}">{escape(x_label)}</text>'
        f'<text class="label y" text-anchor="middle" '
        f'transform="translate(11 {middle}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _x(axis: _Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _thinned(
    points: Sequence[tuple[float, float]], limit: int = _POINTS
) -> list[tuple[float, float]]:
    stride = max(1, len(points) // limit)
    return [*points[::stride], *points[-1:]] if stride > 1 else list(points)


def _usable(points: Sequence[tuple[float, float]], log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log_y)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def _svg(title: str, inside: str, height: float) -> str:
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {_WIDTH} {height}" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    )
