"""Curves over steps, or over a distance: where their points, ticks and labels lie, for a page that draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 240, 64, 40, 10, 14  # pixels, the last four of the margins
MOST_POINTS = 400  # of a curve; more cannot be told apart

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """curves: (name, points as SVG writes them). x_ticks, y_ticks: (place, text). said: the chart in words."""

    title: str
    x_label: str
    curves: list[tuple[str, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    said: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def chart(title: str, curves: Mapping[str, Points], x_label: str = "step") -> Chart:
    """Of name -> points (x, y). Of a long curve every point is the mean of some that follow each other."""
    thinned = {name: _thinned(points) for name, points in curves.items()}
    xs, ys = ([point[i] for points in thinned.values() for point in points] for i in (0, 1))
    x_marks, y_marks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(*ys, *y_marks), max(*ys, *y_marks)

    def x_place(x: float) -> float:
        return round(LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y_place(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / ((y_high - y_low) or 1) * (HEIGHT - BOTTOM - TOP), 1)

    drawn = [(name, " ".join(f"{x_place(x)},{y_place(y)}" for x, y in points)) for name, points in thinned.items()]
    ends = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in curves.items())
    x_ticks = [(x_place(x), f"{x:g}") for x in x_marks if x_low <= x <= x_high]
    return Chart(title, x_label, drawn, x_ticks, [(y_place(y), f"{y:g}") for y in y_marks], f"{title}, by {x_label}: {ends}.")


def _thinned(points: Points) -> list[tuple[float, float]]:
    step = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Some round numbers, the first at or below ``low``, the last at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    return [float(f"{i * step:.10g}") for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
