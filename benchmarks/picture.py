"""A small line chart as SVG: the x axis in powers of two, the y axis from 0."""

from html import escape
from math import ceil, log2, log10
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 64, 44, 40, 90
COLOURS = ("#1f5fbf", "#c2571a", "#2d8a4e")


class Line(NamedTuple):
    name: str
    points: list[tuple[int, float]]


def draw(title: str, lines: list[Line]) -> str:
    """The SVG of some lines over the same x values, each with its name at its end."""
    xs = [x for x, _ in lines[0].points]
    step = nice_step(max(y for line in lines for _, y in line.points))
    top = step * ceil(max(y for line in lines for _, y in line.points) / step)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = log2(x / xs[0]) / log2(xs[-1] / xs[0]), y / top
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    parts = [text(LEFT, 22, title, "start", 13)]
    for number in range(top // step + 1):
        _, y = place(xs[0], number * step)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, f"{number * step:,}", "end"))
    for x in xs:
        across, y = place(x, 0)
        parts.append(text(across, y + 18, str(x), "middle"))
    for line, colour in zip(lines, COLOURS, strict=False):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in line.points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        across, y = place(*line.points[-1])
        parts.append(text(across + 6, y + 4, line.name, "start", colour=colour))
    style = 'font-family="sans-serif" style="background:white"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>{"".join(parts)}</svg>\n'


def nice_step(largest: float) -> int:
    """The distance of about 5 grid lines: 1, 2 or 5 times a power of ten."""
    power = 10 ** int(log10(largest / 5))
    return int(next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= largest))


def text(x: float, y: float, words: str, anchor: str, size: int = 12, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"
