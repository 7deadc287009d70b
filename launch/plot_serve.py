"""The figures of `bench serve` as an SVG without any library: times and throughput against the rate of requests."""

import math
from collections.abc import Sequence
from typing import Any

from moe_nvfp4.launch.plot_schedule import GAP, HEIGHT, MARGIN, WIDTH, text

TIMES = (("time to first token, ms", "first_token"), ("time between tokens, ms", "between_tokens"))
CURVES = (("p50", "#0b6e4f"), ("p90", "#c58b1b"), ("p99", "#b3541e"))
BOTTOM, TOP = HEIGHT - 56, 36


def plot(figures: dict[str, Any]) -> str:
    rates = [one["rate"] for one in figures["rates"]]
    panels = [
        (title, [(name, colour, [1e3 * one[kind][name] for one in figures["rates"]]) for name, colour in CURVES])
        for title, kind in TIMES
    ]
    panels.append(
        ("output, tokens a second", [("", CURVES[0][1], [r["output_tokens_per_second"] for r in figures["rates"]])])
    )
    width = len(panels) * (WIDTH + GAP)
    body = "".join(_panel(title, curves, rates, at * (WIDTH + GAP)) for at, (title, curves) in enumerate(panels))
    style = "text{font:12px sans-serif;fill:#333}"
    background = f'<rect width="{width}" height="{HEIGHT}" fill="white"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}">'
    return f"{head}<style>{style}</style>{background}{body}</svg>\n"


def _panel(title: str, curves: Sequence[tuple[str, str, list[float]]], rates: Sequence[float], left: float) -> str:
    """Both axes are logarithmic and end at powers of ten, the rates' at the first and the last."""
    values = [value for _, _, points in curves for value in points if value > 0] or [1.0]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 1.001))
    first, last = min(rates), max(max(rates), min(rates) * 1.001)

    def place(rate: float, value: float) -> tuple[float, float]:
        across = math.log(rate / first) / math.log(last / first)
        up = math.log(max(value, low) / low) / math.log(high / low)
        return left + MARGIN + across * (WIDTH - MARGIN - 20), BOTTOM - up * (BOTTOM - TOP)

    parts = [text(left + MARGIN, 18, title)]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        (x, y), (end, _) = place(first, 10.0**power), place(last, 10.0**power)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(x - 6, y + 4, f"{10.0**power:g}", "end"))
    taken = -math.inf
    for rate in sorted(set(rates)):
        x, _ = place(rate, low)
        if x - taken > 36:
            parts.append(text(x, BOTTOM + 16, f"{rate:.3g}", "middle"))
            taken = x
    parts.append(text(left + WIDTH - 20, BOTTOM + 34, "requests a second", "end"))
    for row, (name, colour, points) in enumerate(curves):
        placed = [place(rate, value) for rate, value in zip(rates, points, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        if name:
            x = left + MARGIN + row * 60
            parts.append(f'<rect x="{x}" y="{HEIGHT - 17}" width="14" height="3" fill="{colour}"/>')
            parts.append(text(x + 20, HEIGHT - 12, name))
    return "".join(parts)
