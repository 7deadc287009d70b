"""How evenly ranks are loaded, from the JSON of `bench balance`, as an SVG without any library.

python benchmarks/plot_balance.py benchmarks/results/balance.json benchmarks/balance.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

from drawing import COLOURS, GAP, HEIGHT, MARGIN, ROW, WIDTH, legend, page, text

KINDS = (
    ("in order", "first_window", "even"),
    ("rebalanced", "first_window", "after"),
    ("lower bound", "first_window", "best"),
    ("for the window before", "later_windows", "last"),
)


def main(source: str, target: str) -> None:
    panels: dict[str, list[dict[str, Any]]] = {}
    for figures in json.loads(Path(source).read_text())["results"]:
        title = f"{figures['model']}, {figures['ranks']} ranks of {figures['slots_per_rank']} slots"
        panels.setdefault(title, []).append(figures)
    Path(target).write_text(page([panel(i % ROW, title, traces) for i, (title, traces) in enumerate(panels.items())]))


def panel(index: int, title: str, traces: list[dict[str, Any]]) -> str:
    """Mean over largest load, a group of bars for each trace."""
    left, bottom, high = index * (WIDTH + GAP) + MARGIN, HEIGHT - 32, HEIGHT - 110
    parts = [text(left, 18, title)]
    for quarter in range(5):
        y = bottom - high * quarter / 4
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH - MARGIN}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, f"{25 * quarter} %", "end"))
    group = (WIDTH - MARGIN) / len(traces)
    for column, figures in enumerate(traces):
        parts.append(text(left + group * (column + 0.5), bottom + 16, figures["trace"], "middle"))
        for row, (_, window, kind) in enumerate(KINDS):
            x, height = left + group * column + 5 + row * (group - 10) / len(KINDS), high * figures[window][kind]
            size = f'width="{(group - 10) / len(KINDS):.1f}" height="{height:.1f}"'
            parts.append(f'<rect x="{x:.1f}" y="{bottom - height:.1f}" {size} fill="{COLOURS[row]}"/>')
    for row, (name, _, _) in enumerate(KINDS):
        parts += legend(index, row, name, COLOURS[row])
    return "".join(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
