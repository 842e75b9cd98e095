"""Figures as inline SVG: bars with error bars, curves with bands, histograms. No plotting library.

What lives here: the mapping from data to pixels (`Axis`) and three kinds of figures, each a pure function to a string.
What does not: pages and colors: the marks carry CSS classes (`s0`, `s1`, ... for series), which `html` colors for light
and dark.
"""

import html as escape
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 22, 44


class Axis(NamedTuple):
    """A linear map from data to pixels: `low` lands on `start`, `high` on `end` (`end < start` for upward axes)."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value, rounded to hundredths.

        Args:
          value: in data units.

        Returns:
          The pixel.
        """
        span = self.high - self.low
        return round(self.start + (value - self.low) / span * (self.end - self.start), 2) if span else self.start


class Bar(NamedTuple):
    """A bar: its series, the label above it, its height in [0, 1], and the interval drawn as an error bar."""

    series: int
    name: str
    value: float
    interval: tuple[float, float]


class Curve(NamedTuple):
    """A curve: its name, its points, and the intervals drawn as a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two ends.

    Args:
      low: lower end.
      high: upper end, above `low`.
      most: at most so many ticks.

    Returns:
      Multiples of 1, 2 or 5 times a power of ten.
    """
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    values = []
    while (first + len(values)) * step <= high + step * 1e-6:
        values.append(float(f"{(first + len(values)) * step:.10g}"))
    return values


def _text(x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape.escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def _frame(title: str, marks: Sequence[str], width: int, height: int) -> str:
    words = escape.escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{words}</title>{''.join(marks)}</svg>"
    )


def _shares(axis: Axis, right: float) -> list[str]:
    """Grid lines and labels of an axis of shares, in percent."""
    out = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = axis.at(value)
        out += [
            _line(LEFT, y, right, y, "grid" if value else "base"),
            _text(LEFT - 8, y + 4, f"{value:.0%}", anchor="end"),
        ]
    return out


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Draw groups of bars with error bars, on an axis from 0 to 100 %.

    Args:
      title: for readers who do not see the figure.
      groups: label of each group and its bars.
      width: of the view box.
      height: of the view box.

    Returns:
      The SVG element.
    """
    up = Axis(0.0, 1.0, height - BOTTOM, TOP)
    marks = _shares(up, width - RIGHT)
    slot = (width - LEFT - RIGHT) / max(len(groups), 1)
    for g, (label, group) in enumerate(groups):
        wide = min(72.0, 0.8 * slot / max(len(group), 1))
        first = LEFT + (g + 0.5) * slot - wide * len(group) / 2
        for i, bar in enumerate(group):
            x, y = round(first + i * wide, 2), up.at(bar.value)
            middle, (low, high) = round(x + wide / 2, 2), (up.at(v) for v in bar.interval)
            inset = round(wide * 0.08, 2)
            hint = f"{label}, {bar.name}: {bar.value:.2%} ({bar.interval[0]:.2%} to {bar.interval[1]:.2%})"
            marks.append(
                f'<rect x="{x + inset:.2f}" y="{y}" width="{wide - 2 * inset:.2f}" height="{up.at(0) - y:.2f}" rx="3" '
                f'class="bar s{bar.series}"><title>{escape.escape(hint)}</title></rect>'
            )
            marks.append(_line(middle, low, middle, high, "error"))
            marks += [_line(middle - 6, edge, middle + 6, edge, "error") for edge in (low, high)]
            marks.append(_text(middle, min(high, y) - 6, f"{bar.value:.1%}", "value"))
            marks.append(_text(middle, up.at(0) + 16, bar.name))
        marks.append(_text(round(LEFT + (g + 0.5) * slot, 2), up.at(0) + 34, _short(label, int(slot / 8)), "label"))
    return _frame(title, marks, width, height)


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: max(most - 1, 1)] + "…"


def curves(
    title: str, lines: Sequence[Curve], xlabel: str, width: int = WIDTH, height: int = HEIGHT, series: int = 0
) -> str:
    """Draw curves of shares with bands.

    Args:
      title: for readers who do not see the figure.
      lines: the curves; the i-th has the class `s<series + i>`.
      xlabel: words below the axis.
      width: of the view box.
      height: of the view box.
      series: number of the color of the first curve.

    Returns:
      The SVG element.
    """
    top = max((max(c.x) for c in lines if len(c.x)), default=1.0)
    across, up = Axis(0.0, top, LEFT + 6, width - RIGHT - 8), Axis(0.0, 1.0, height - BOTTOM, TOP)
    marks = _shares(up, width - RIGHT)
    marks += [_text(across.at(v), up.at(0) + 16, f"{v:g}") for v in ticks(0.0, top)]
    marks.append(_text((LEFT + width - RIGHT) / 2, height - 8, xlabel, "label"))
    for i, curve in enumerate(lines, series):
        upper = [f"{across.at(x)},{up.at(high)}" for x, (_, high) in zip(curve.x, curve.intervals)]
        lower = [f"{across.at(x)},{up.at(low)}" for x, (low, _) in zip(curve.x, curve.intervals)]
        marks.append(f'<polygon points="{" ".join(upper + lower[::-1])}" class="band s{i}"/>')
    for i, curve in enumerate(lines, series):
        points = " ".join(f"{across.at(x)},{up.at(y)}" for x, y in zip(curve.x, curve.y))
        marks.append(f'<polyline points="{points}" class="curve s{i}"/>')
        for x, y in zip(curve.x, curve.y):
            hint = escape.escape(f"{curve.name}: {y:.2%} at {x:g}")
            marks.append(
                f'<circle cx="{across.at(x)}" cy="{up.at(y)}" r="4" class="dot s{i}"><title>{hint}</title></circle>'
            )
    return _frame(title, marks, width, height)


def histogram(
    title: str, sizes: Sequence[float], top: float, xlabel: str, series: int = 0, bins: int = 20, height: int = 200
) -> str:
    """Draw how sizes spread between 0 and `top`.

    Args:
      title: for readers who do not see the figure.
      sizes: the values; those a rounding above `top` fall into the last bin.
      top: right end of the axis.
      xlabel: words below the axis.
      series: number of the color.
      bins: number of bins.
      height: of the view box.

    Returns:
      The SVG element.
    """
    counts = count(sizes, top, bins)
    most = max(max(counts), 1)
    across, up = Axis(0.0, top, LEFT, WIDTH - RIGHT), Axis(0.0, float(most), height - BOTTOM, TOP)
    marks = []
    for value in ticks(0.0, float(most), 4):
        if value == int(value):
            y = up.at(value)
            marks += [_line(LEFT, y, WIDTH - RIGHT, y, "grid" if value else "base")]
            marks += [_text(LEFT - 8, y + 4, f"{value:g}", anchor="end")]
    for i, height_of in enumerate(counts):
        x, end, y = across.at(i * top / bins), across.at((i + 1) * top / bins), up.at(height_of)
        if height_of:
            hint = f"{height_of} between {i * top / bins:.4g} and {(i + 1) * top / bins:.4g}"
            marks.append(
                f'<rect x="{x + 1:.2f}" y="{y}" width="{end - x - 2:.2f}" height="{up.at(0) - y:.2f}" '
                f'class="bar s{series}"><title>{hint}</title></rect>'
            )
    marks += [_text(across.at(v), up.at(0) + 16, f"{v:g}") for v in ticks(0.0, top)]
    marks.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, xlabel, "label"))
    return _frame(title, marks, WIDTH, height)


def count(sizes: Sequence[float], top: float, bins: int) -> list[int]:
    """Count values in equal bins of (0, top], each bin with its upper end; 0 falls into the first.

    Args:
      sizes: the values.
      top: upper end of the last bin.
      bins: number of bins.

    Returns:
      A count for each bin.
    """
    counts = [0] * bins
    for size in sizes:
        counts[min(max(math.ceil(size / top * bins - 1e-6) - 1, 0), bins - 1)] += 1
    return counts
