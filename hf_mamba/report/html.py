"""HTML and SVG for the report: a page, a table, a plot. No scripts, no files from elsewhere, light and dark."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from hf_mamba.run.log import Thinned

COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#0099c6", "#b8860b", "#dd4477", "#66aa00")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 30, 40
POINTS = 1000  # of a curve; a longer one is thinned out, keeping each stretch's extremes

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #181818; --line: #444; --quiet: #999; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 2em auto; max-width: 1180px; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25em .8em .25em 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } .samples td:last-child { white-space: pre-wrap; font-family: monospace; }
.note { color: var(--quiet); } .plots { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; max-width: 560px; }
figcaption { font-size: .85em; } .key { display: inline-block; overflow-wrap: anywhere; margin-right: 1em; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .title { font-size: 13px; font-weight: 600; } svg .grid { stroke: var(--line); stroke-width: .5; }
summary { cursor: pointer; margin-top: 2em; }
"""


class Axis(Enum):
    """Where the vertical axis of a plot begins, and how its numbers are written."""

    NEAR = "a little below the lowest value"
    ZERO = "0"
    PERCENT = "0 %"
    LOGARITHMIC = "a power"


@dataclass(frozen=True)
class Series:
    """A curve: (x, y) points in the order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def page(title: str, body: str) -> str:
    """A whole document."""
    title = html.escape(title)
    return (
        f"<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>{title}</title>\n"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], cls: str = "", means: Mapping[str, str] | None = None
) -> str:
    """A table of plain texts; `means` explains those of the first column, under the pointer."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = []
    for row in rows:
        told = (means or {}).get(row[0])
        first = f"<td title='{html.escape(told)}'>" if told else "<td>"
        lines.append(first + "</td><td>".join(html.escape(cell) for cell in row) + "</td>")
    return f"<table class='{cls}'><tr>{top}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def plot(title: str, unit: str, series: Sequence[Series], axis: Axis = Axis.NEAR) -> str:
    """Curves over tokens, with a key; each point's value appears under the pointer."""
    logarithmic, percent = axis is Axis.LOGARITHMIC, axis is Axis.PERCENT
    if percent:
        series = [Series(s.label, [(x, 100 * y) for x, y in s.points], s.dots) for s in series]
    if logarithmic:
        series = [Series(s.label, [(x, y) for x, y in s.points if y > 0], s.dots) for s in series]
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    x_low, x_high = _span([x for x, _ in points], from_zero=True)
    heights = [y for _, y in points]
    logarithmic = logarithmic and max(heights) > 10 * min(heights)  # within a decade its ticks would be odd numbers
    zero = axis in (Axis.ZERO, Axis.PERCENT) and min(heights) >= 0
    y_low, y_high = _span([math.log10(y) if logarithmic else y for y in heights], zero)

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if logarithmic else y
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f"<text class=title x={LEFT} y=16>{html.escape(title)}{', ' if unit else ''}{html.escape(unit)}</text>"]
    for tick in _ticks(x_low, x_high):
        x = place(tick, 10**y_low if logarithmic else y_low)[0]
        parts.append(f"<text x={x:.1f} y={HEIGHT - BOTTOM + 16} text-anchor=middle>{_short(tick)}</text>")
    parts.append(f"<text x={WIDTH - RIGHT} y={HEIGHT - 8} text-anchor=end>tokens</text>")
    for tick in _ticks(y_low, y_high):
        value = 10**tick if logarithmic else tick
        y = place(x_low, value)[1]
        parts.append(f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />")
        parts.append(
            f"<text x={LEFT - 6} y={y + 4:.1f} text-anchor=end>{f'{value:.3g} %' if percent else _short(value)}</text>"
        )
    for number, one in enumerate(series):
        parts.append(_curve(one, COLOURS[number % len(COLOURS)], place))
    keys = " ".join(
        f"<span class=key><span style='color:{COLOURS[i % len(COLOURS)]}'>&#9632;</span> {html.escape(s.label)}</span>"
        for i, s in enumerate(series)
    )
    drawing = "".join(parts)
    return (
        f"<figure><svg viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} role=img aria-label='{html.escape(title)}'>"
        f"{drawing}</svg><figcaption>{keys}</figcaption></figure>"
    )


def _curve(one: Series, colour: str, place: "object") -> str:
    assert callable(place)
    points = thin(one.points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts = [f"<polyline fill=none stroke='{colour}' stroke-width=1.5 points='{path}' />"]
    if one.dots or len(points) <= 60:
        for x, y in points:
            at = place(x, y)
            note = f"<title>{html.escape(one.label)}: {y:.6g} at {_short(x)}</title>"
            parts.append(f"<circle cx={at[0]:.1f} cy={at[1]:.1f} r=2.5 fill='{colour}'>{note}</circle>")
    return "".join(parts)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= POINTS:
        return list(points)
    curve = Thinned[tuple[float, float]](POINTS // 2)
    for number, (x, y) in enumerate(points):
        curve.add(number, y, (x, y))
    return curve.items()


def _span(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = 0.0
    margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return (low if from_zero else low - margin), high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    """1.5M, 20k, 0.0004"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
