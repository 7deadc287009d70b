"""What the kinds of `moe-nvfp4 bench` share: lists of numbers as arguments, and figures as JSON."""

import json
import platform
from pathlib import Path
from typing import Any

from moe_nvfp4.errors import RequestError


def where(model: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"model": Path(model).name, "machine": name, "torch": torch.__version__}


def numbers(option: str, text: str, *, low: int = 1) -> list[int]:
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < low:
        raise RequestError(f"{option}: got {text!r:.80}; expected numbers from {low}, like 1,8,64")
    return found


def pair(option: str, text: str) -> tuple[int, int]:
    found = numbers(option, text)
    if len(found) != 2:
        raise RequestError(f"{option}: got {text!r:.80}; expected two lengths, the shortest and the longest")
    return found[0], found[1]


def write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
