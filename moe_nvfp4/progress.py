"""A progress line on standard error for anything slow; silent where nobody looks."""

import sys
import threading
import time


class Progress:
    """Counts bytes from several threads and redraws one line a few times a second."""

    def __init__(self, label: str, total: int, *, enabled: bool | None = None):
        self.label, self.total, self.done = label, max(total, 1), 0
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.started = time.perf_counter()
        self._drawn, self._lock = 0.0, threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            now = time.perf_counter()
            if self.enabled and now - self._drawn > 0.1:
                self._drawn = now
                self._draw("\r")

    def _draw(self, start: str) -> None:
        seconds = time.perf_counter() - self.started
        filled = 30 * min(self.done, self.total) // self.total
        unit, name = (1e9, "GB") if self.total >= 1e8 else (1e6, "MB")
        print(
            f"{start}{self.label} [{'#' * filled}{'.' * (30 - filled)}] {self.done / unit:.2f}/{self.total / unit:.2f} "
            f"{name}  {self.done / unit / max(seconds, 1e-9):.1f} {name}/s  {seconds:.1f} s ",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._draw("\r")
            print(file=sys.stderr)
