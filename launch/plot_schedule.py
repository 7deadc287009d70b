"""The distributions of `bench schedule` as an SVG without any library: a panel for each trace."""

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN, GAP = 380, 300, 48, 20
CURVES = (("time to first token", "first_token_ms", "#b3541e"), ("time between tokens", "between_tokens_ms", "#0b6e4f"))
FIRST = 1.0  # milliseconds; the axis is logarithmic


def plot(results: Sequence[dict[str, Any]]) -> str:
    width = len(results) * (WIDTH + GAP)
    body = "".join(_panel(figures, index * (WIDTH + GAP)) for index, figures in enumerate(results))
    style = "text{font:12px sans-serif;fill:#333}"
    background = f'<rect width="{width}" height="{HEIGHT}" fill="white"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}">'
    return f"{head}<style>{style}</style>{background}{body}</svg>\n"


def _panel(figures: dict[str, Any], left: float) -> str:
    """Which share of the times is at most so long."""
    slowest = max(measured[kind]["max"] for measured in (figures, figures["uncut"]) for _, kind, _ in CURVES)
    last = 10 ** math.ceil(math.log10(max(10 * FIRST, slowest)))

    def place(milliseconds: float, share: float) -> tuple[float, float]:
        across = math.log(max(milliseconds, FIRST) / FIRST) / math.log(last / FIRST)
        return left + MARGIN + across * (WIDTH - MARGIN - 10), HEIGHT - 40 - share * (HEIGHT - 80)

    parts = [text(left + MARGIN, 18, f"{figures['trace']}, {figures['requests']:,} requests, simulated")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, y), (end, _) = place(FIRST, share), place(last, share)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(x - 6, y + 4, f"{share:.0%}", "end"))
    tick = FIRST
    while tick <= last:
        x, y = place(tick, 0.0)
        parts.append(text(x, y + 16, f"{tick:g} ms" if tick < 1e3 else f"{tick / 1e3:g} s", "middle"))
        tick *= 10
    for row, (name, kind, colour) in enumerate(CURVES):
        for measured, style in ((figures, 'stroke-width="2"'), (figures["uncut"], 'stroke-dasharray="3"')):
            curve = (place(ms, share) for share, ms in measured[kind]["curve"])
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
        y = HEIGHT - 12
        x = left + MARGIN + row * 150
        parts.append(f'<rect x="{x}" y="{y - 5}" width="14" height="3" fill="{colour}"/>')
        parts.append(text(x + 20, y, name))
    parts.append(text(left + WIDTH - 10, 34, "dashed: prompts not cut for those who answer", "end"))
    return "".join(parts)


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'
