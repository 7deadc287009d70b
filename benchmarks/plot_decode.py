"""Tokens a second against batch size, from the JSON of `bench decode`, as an SVG without any library.

python benchmarks/plot_decode.py benchmarks/results/decode-*.json benchmarks/decode.svg
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN, GAP = 430, 300, 56, 30
OURS, PEER, FLOOR = "#0b6e4f", "#b3541e", "#888888"
Points = list[tuple[float, float]]


def main(arguments: Sequence[str]) -> None:
    *inputs, output = map(Path, arguments)
    panels = [json.loads(path.read_text()) for path in inputs]
    width = len(panels) * (WIDTH + GAP)
    body = "".join(panel(figures, index * (WIDTH + GAP)) for index, figures in enumerate(panels))
    style = "text{font:12px sans-serif;fill:#333}"
    background = f'<rect width="{width}" height="{HEIGHT}" fill="white"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}">'
    output.write_text(f"{head}<style>{style}</style>{background}{body}</svg>\n")


def panel(figures: dict[str, Any], left: float) -> str:
    """Both axes are logarithmic."""
    ours: Points = [(r["batch"], r["tokens_per_second"]) for r in figures["decode"]]
    bandwidth = figures["read_bytes_per_second"]
    floor: Points = [(r["batch"], r["batch"] * bandwidth / r["bytes"]) for r in figures["decode"]]
    peer: Points = [(int(batch), 1e3 * int(batch) / ms) for batch, ms in figures["peer"]["decode_ms"].items()]
    low, high = (f(rate for _, rate in ours + peer + floor) for f in (min, max))
    last = max(batch for batch, _ in ours)

    def place(batch: float, rate: float) -> tuple[float, float]:
        across = math.log(batch) / math.log(last)
        up = math.log(rate / low) / math.log(high / low)
        return left + MARGIN + across * (WIDTH - MARGIN - 10), HEIGHT - 40 - up * (HEIGHT - 80)

    parts = [text(left + MARGIN, 18, figures["model"].split("/")[-1] + ", one H200")]
    for batch, _ in ours:
        x, y = place(batch, low)
        parts.append(text(x, y + 16, str(batch), "middle"))
    rate = 10 ** math.ceil(math.log10(low))
    while rate <= high:
        x, y = place(1, rate)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="{left + WIDTH - 10}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(x - 6, y + 4, f"{rate:,}", "end"))
        rate *= 10
    parts.append(text(left + (WIDTH + MARGIN) / 2, HEIGHT - 6, "batch", "middle"))
    for row, (name, points, colour) in enumerate(
        (("moe-nvfp4, tok/s", ours, OURS), ("vLLM 0.26.0", peer, PEER), ("every byte read once", floor, FLOOR))
    ):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(points)))
        dash = ' stroke-dasharray="4 3"' if colour == FLOOR else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<rect x="{left + MARGIN + 8}" y="{34 + 16 * row}" width="14" height="3" fill="{colour}"/>')
        parts.append(text(left + MARGIN + 28, 40 + 16 * row, name))
    return "".join(parts)


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


if __name__ == "__main__":
    main(sys.argv[1:])
