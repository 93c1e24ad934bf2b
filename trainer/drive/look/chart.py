"""Curves as SVG inside the page: lines, axes, a legend, and the value under the pointer, without a script.

Series differ by colour and by dashes, so that they can be told apart without colours too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10
from statistics import fmean

from trainer.drive.look.html import Markup, element, join
from trainer.records import Curve

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 10, 30
COLOURS, DASHES = 8, 4
MOST = 120
"""Points of a line; of longer curves, means of neighbours."""
TICKS = 5
LOG_ABOVE = 8.0
"""Largest over smallest value from which a logarithmic axis shows more than a linear one."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart. ``colour``: its number, the same for a run in every chart."""

    name: str
    curve: Curve
    colour: int


@dataclass(frozen=True, slots=True)
class Axis:
    """Values of one direction onto coordinates ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The coordinate of ``value``."""
        low, high, here = (log10(x) for x in (self.low, self.high, value)) if self.logarithmic else self._plain(value)
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def _plain(self, value: float) -> tuple[float, float, float]:
        return self.low, self.high, value

    def ticks(self) -> list[float]:
        """Round values inside, about ``TICKS`` of them."""
        if self.logarithmic:
            decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            found = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
            inside = [value for value in found if self.low <= value <= self.high]
            return inside if 2 <= len(inside) <= 2 * TICKS else inside[:: max(1, len(inside) // TICKS)]
        step = _round_step((self.high - self.low) / TICKS)
        return [number * step for number in range(ceil(self.low / step), floor(self.high / step) + 1)]


def thinned(curve: Curve, most: int = MOST) -> Curve:
    """``curve`` with at most ``most`` points: means of neighbours, at the last of their steps."""
    count = len(curve.values)
    if count <= most:
        return curve
    edges = [place * count // most for place in range(most + 1)]
    return Curve(
        [curve.steps[stop - 1] for _, stop in pairwise(edges)],
        [fmean(curve.values[start:stop]) for start, stop in pairwise(edges)],
    )


def chart(title: str, series: Sequence[Series]) -> Markup:
    """A figure with a heading, the lines, and a legend where there are several; each curve has a point at least."""
    lines = [Series(one.name, thinned(one.curve), one.colour) for one in series]
    across, up = _axes(lines)
    drawing = element(
        "svg",
        _grid(across, up),
        [_line(one, across, up) for one in lines],
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: " + "; ".join(_in_words(one) for one in series),
    )
    thin = max(len(one.curve.values) for one in series) > MOST
    caption = f"{title}, by optimizer step" + (f" (means of neighbours, {MOST} points)" if thin else "")
    legend = element("ul", [_legend(one) for one in series], class_="legend") if len(series) > 1 else ""
    return element("figure", element("figcaption", caption), drawing, legend)


def _axes(lines: Sequence[Series]) -> tuple[Axis, Axis]:
    steps = [step for one in lines for step in one.curve.steps]
    values = [value for one in lines for value in one.curve.values if isfinite(value)]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > LOG_ABOVE
    if low == high:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    elif not logarithmic:
        margin = (high - low) / 20
        low, high = low - margin, high + margin
    first, last = min(steps), max(steps)
    across = Axis(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    return across, Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic)


def _grid(across: Axis, up: Axis) -> Markup:
    parts = [
        element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=up.place(y), y2=up.place(y), class_="grid") for y in up.ticks()
    ]
    parts += [
        element("text", f"{y:.4g}", x=LEFT - 6, y=up.place(y) + 4, text_anchor="end", class_="tick") for y in up.ticks()
    ]
    whole = [x for x in across.ticks() if x == int(x)] or [across.low]
    parts += [
        element("text", f"{x:,.0f}", x=across.place(x), y=HEIGHT - 10, text_anchor="middle", class_="tick")
        for x in whole
    ]
    return join(parts)


def _line(one: Series, across: Axis, up: Axis) -> Markup:
    points = [
        (across.place(step), up.place(value), step, value)
        for step, value in zip(one.curve.steps, one.curve.values, strict=True)
        if isfinite(value)
    ]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    few = len(points) <= MOST // 4
    dots = [
        element(
            "circle",
            element("title", f"{one.name}: {value:.5g} at step {step:,}"),
            cx=x,
            cy=y,
            r=3 if few else 5,
            class_="dot" if few else "spot",
        )
        for x, y, step, value in points
    ]
    return element("g", element("polyline", points=drawn), dots, class_=f"series {look_of(one.colour)}")


def _legend(one: Series) -> Markup:
    swatch = element(
        "svg",
        element("g", element("polyline", points="0,6 34,6"), class_=f"series {look_of(one.colour)}"),
        viewBox="0 0 34 12",
        aria_hidden="true",
    )
    return element("li", swatch, element("span", one.name))


def look_of(colour: int) -> str:
    """Classes of the line of that number: colours first, and other dashes with each round of colours."""
    return f"c{colour % COLOURS} d{(colour + colour // COLOURS) % DASHES}"


def _in_words(one: Series) -> str:
    values = one.curve.values
    return f"{one.name} from {values[0]:.4g} to {values[-1]:.4g}, lowest {min(values):.4g}"


def _round_step(raw: float) -> float:
    """1, 2 or 5 times a power of ten, not below ``raw``."""
    power = 10.0 ** floor(log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
