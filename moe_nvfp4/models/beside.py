"""Two branches of a layer side by side on a GPU: where rows are few, neither fills it."""

from collections.abc import Callable

import torch

FEW_ROWS = 64


class Beside:
    """A second stream. With many rows, and on a CPU, one branch follows the other."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(
        self, rows: int, first: Callable[[], torch.Tensor], second: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What both branches give. Their inputs must live until this returns: each stream reuses its own memory."""
        if self._stream is None or rows > FEW_ROWS:
            return first(), second()
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            beside = first()
        result = second()
        main.wait_stream(self._stream)
        return beside, result
