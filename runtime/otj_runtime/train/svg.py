"""Line charts as SVG text: pure, no assets, colours from the page's CSS variables so that they follow its light or dark scheme.

    series (step, value) -> thinned to POINTS by averaging neighbours -> scaled -> a faint line of the values, a bold one smoothed

Each chart names itself to screen readers and carries narrow strips that show their numbers on hover, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

POINTS = 240
"""Most points of a drawn line; more cannot be told apart."""

STRIPS = 60
"""Most places of a chart that show their numbers on hover."""

SMOOTHED_FROM = 30
"""Points from which a line is smoothed."""

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 28

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named series of (step, value), steps rising."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """A range and the round numbers within it, in rising order."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where `value` lies, 0 at `low` and 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points, each the mean of neighbours; the order stays."""
    if len(points) <= most:
        return list(points)
    bounds = [round(i * len(points) / most) for i in range(most + 1)]
    chunks = [points[a:b] for a, b in pairwise(bounds)]
    return [(chunk[-1][0], math.fsum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each point as the mean of its neighbourhood, a fifteenth of the line, narrower towards the ends so that they are not pulled in."""
    reach = len(points) // 30
    found = []
    for i, (step, _) in enumerate(points):
        near = min(reach, max(2, i), max(2, len(points) - 1 - i))
        window = points[max(0, i - near) : i + near + 1]
        found.append((step, math.fsum(value for _, value in window) / len(window)))
    return found


def axis(low: float, high: float, *, wanted: int = 4, whole: bool = False) -> Axis:
    """An axis over the range with about `wanted` round ticks; `whole` ones for counts. A single value gets room around it."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * magnitude for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(i * step for i in range(first, last + 1)))


def number(value: float) -> str:
    """A number for people: three digits, thousands as k and M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / ({'G': 1e9, 'M': 1e6, 'k': 1e3}[suffix]):.3g}{suffix}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def chart(title: str, lines: Sequence[Line], *, low: float | None = None, high: float | None = None) -> str:
    """An SVG of `lines` over steps; `low` and `high` widen the vertical range to include them.

    Raises:
        ValueError: if no line has a point.
    """
    drawn = [Line(line.name, thin(line.points, POINTS)) for line in lines if line.points]
    values = [value for line in drawn for _, value in line.points] + [bound for bound in (low, high) if bound is not None]
    steps = [step for line in drawn for step, _ in line.points]
    if not steps:
        raise ValueError(f"chart {title} has no points")
    margin = (max(values) - min(values)) * 0.06
    across = axis(min(steps), max(steps), wanted=5, whole=True)
    up = axis(
        min(values) - (0 if low is not None and min(values) >= low else margin),
        max(values) + (0 if high is not None and max(values) <= high else margin),
    )
    parts = [_grid(across, up), *(_line(i, line, across, up) for i, line in enumerate(drawn)), _strips(drawn, across)]
    ends = "; ".join(f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in drawn)
    label = escape(f"{title}: {ends}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _x(across: Axis, step: float) -> float:
    return LEFT + across.share(step) * (WIDTH - LEFT - RIGHT)


def _y(up: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM)


def _grid(across: Axis, up: Axis) -> str:
    rows = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(up, t):.1f}" y2="{_y(up, t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{_y(up, t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
        for t in up.ticks
    )
    columns = "".join(
        f'<text class="tick" x="{_x(across, t):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(t)}</text>' for t in across.ticks
    )
    return rows + columns


def _line(index: int, line: Line, across: Axis, up: Axis) -> str:
    def path(points: Sequence[Point]) -> str:
        return " ".join(f"{_x(across, step):.1f},{_y(up, value):.1f}" for step, value in points)

    colour = f"c{index % 4 + 1}"
    if len(line.points) == 1:
        step, value = line.points[0]
        return f'<circle class="dot {colour}" cx="{_x(across, step):.1f}" cy="{_y(up, value):.1f}" r="4"/>'
    if len(line.points) < SMOOTHED_FROM:
        dots = "".join(f'<circle class="dot {colour}" cx="{_x(across, s):.1f}" cy="{_y(up, v):.1f}" r="2.5"/>' for s, v in line.points)
        return f'<polyline class="line {colour}" points="{path(line.points)}"/>{dots}'
    faint = f'<polyline class="line faint {colour}" points="{path(line.points)}"/>'
    return f'{faint}<polyline class="line {colour}" points="{path(smooth(line.points))}"/>'


def _strips(lines: Sequence[Line], across: Axis) -> str:
    """Invisible columns that show, on hover, what the lines are there."""
    longest = max(lines, key=lambda line: len(line.points))
    thinned = [(line.name, dict(thin(line.points, min(STRIPS, len(longest.points))))) for line in lines]
    width = (WIDTH - LEFT - RIGHT) / max(1, len(thin(longest.points, STRIPS)))
    found = []
    for step, _ in thin(longest.points, STRIPS):
        shown = ", ".join(f"{name} {number(points[step])}" for name, points in thinned if step in points)
        x = min(max(_x(across, step) - width / 2, LEFT), WIDTH - RIGHT - width)
        found.append(
            f'<rect class="strip" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(f'step {step:.0f}: {shown}')}</title></rect>"
        )
    return "".join(found)
