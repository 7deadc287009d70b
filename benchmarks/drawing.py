"""Panels of lines and of stacked bars over numbers of GPUs, in one SVG, without any library."""

import math
from collections.abc import Callable, Sequence

COLOURS = ("#0b6e4f", "#b3541e", "#3b5b92", "#888888", "#c9a227")
WIDTH, HEIGHT, MARGIN, GAP = 360, 290, 52, 24
ROW = 3
Points = list[tuple[float, float]]


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def page(panels: Sequence[str]) -> str:
    """Rows of panels, each drawn for its place in its row."""
    rows = [panels[start : start + ROW] for start in range(0, len(panels), ROW)]
    width, height = len(rows[0]) * (WIDTH + GAP), len(rows) * HEIGHT
    body = "".join(f'<g transform="translate(0 {i * HEIGHT})">{"".join(row)}</g>' for i, row in enumerate(rows))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    style = "<style>text{font:12px sans-serif;fill:#333}</style>"
    return f'{head}{style}<rect width="{width}" height="{height}" fill="white"/>{body}</svg>\n'


def frame(
    index: int, title: str, top: float, unit: str, ticks: Sequence[int]
) -> tuple[list[str], Callable[[float, float], tuple[float, float]]]:
    """GPUs across, logarithmic; up from 0 to `top`."""
    left = index * (WIDTH + GAP) + MARGIN

    def place(gpus: float, value: float) -> tuple[float, float]:
        across = math.log2(gpus / ticks[0]) / math.log2(ticks[-1] / ticks[0])
        return left + 14 + across * (WIDTH - MARGIN - 28), HEIGHT - 40 - value / top * (HEIGHT - 120)

    parts = [text(left, 18, title)]
    for quarter in range(5):
        _, y = place(ticks[0], top * quarter / 4)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH - MARGIN}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, f"{top * quarter / 4:,g}{unit}", "end"))
    parts += [text(place(gpus, 0)[0], HEIGHT - 24, str(gpus), "middle") for gpus in ticks]
    parts.append(text(left + (WIDTH - MARGIN) / 2, HEIGHT - 8, "GPUs", "middle"))
    return parts, place


def lines(index: int, title: str, top: float, unit: str, curves: dict[str, Points]) -> str:
    ticks = [int(gpus) for gpus, _ in next(iter(curves.values()))]
    parts, place = frame(index, title, top, unit, ticks)
    for row, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += legend(index, row, name, colour)
    return "".join(parts)


def bars(index: int, title: str, top: float, unit: str, columns: dict[int, dict[str, float]]) -> str:
    parts, place = frame(index, title, top, unit, list(columns))
    for gpus, values in columns.items():
        below = 0.0
        for value, colour in zip(values.values(), COLOURS, strict=False):
            (x, y), (_, base) = place(gpus, below + value), place(gpus, below)
            parts.append(f'<rect x="{x - 11:.1f}" y="{y:.1f}" width="22" height="{base - y:.1f}" fill="{colour}"/>')
            below += value
    for row, (name, colour) in enumerate(zip(next(iter(columns.values())), COLOURS, strict=False)):
        parts += legend(index, row, name, colour)
    return "".join(parts)


def legend(index: int, row: int, name: str, colour: str) -> list[str]:
    x, y = index * (WIDTH + GAP) + MARGIN + row % 2 * 160, 34 + row // 2 * 15
    return [f'<rect x="{x}" y="{y - 4}" width="14" height="3" fill="{colour}"/>', text(x + 20, y + 2, name)]


def ceiling(value: float) -> float:
    scale = 10 ** math.floor(math.log10(value))
    return next(scale * factor for factor in (1, 2, 4, 6, 8, 10) if scale * factor >= value)
