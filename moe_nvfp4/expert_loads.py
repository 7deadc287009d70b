"""How many rows each expert took: one account, which the server shows and rebalancing uses."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from moe_nvfp4.errors import EngineError

Rows = dict[int, list[int]]  # layer -> rows of each logical expert

READ_EVERY: Final = 1.0  # seconds; a look waits for the steps in flight, so those who ask share one


class ExpertLoads:
    """Any thread may ask. `read` gives the rows since what counts them was loaded; a group may be loaded again."""

    def __init__(self, read: Callable[[], Rows], routed: int):
        """`routed`: so many experts, the first ones, take rows by choice; a shared one after them takes all rows."""
        self._read, self._routed = read, routed
        self._lock = threading.Lock()
        self._seen, self._total, self._taken = Rows(), Rows(), Rows()
        self._read_at = -READ_EVERY
        self._reading = threading.Lock()  # in a thread that nobody waits for

    def rows(self) -> Rows:
        """Of the routed experts since the start, at most a second old; as known when the engine has ended."""
        with self._lock:
            if time.monotonic() - self._read_at >= READ_EVERY:
                with suppress(EngineError):
                    self._look()
            return self._shown()

    def known(self) -> Rows:
        """The same without waiting, as it was read last; if that is old, it is read again behind the caller's back."""
        if time.monotonic() - self._read_at >= READ_EVERY and self._reading.acquire(blocking=False):
            threading.Thread(target=self._refresh, daemon=True).start()
        return self._shown()

    def take(self) -> Rows:
        """Of all experts, up to now, since the last call."""
        with self._lock:
            self._look()
            taken, self._taken = self._taken, self._total
        return {layer: _less(rows, taken.get(layer)) for layer, rows in self._total.items()}

    def _look(self) -> None:
        now = self._read()
        if any(min(_less(rows, self._seen.get(layer))) < 0 for layer, rows in now.items()):
            self._seen = {}  # counted from zero again
        new = {layer: _less(rows, self._seen.get(layer)) for layer, rows in now.items()}
        zero = [0] * max(map(len, now.values()), default=0)
        self._total = {
            layer: [one + more for one, more in zip(self._total.get(layer, zero), rows, strict=True)]
            for layer, rows in new.items()
        }
        self._seen, self._read_at = now, time.monotonic()

    def _refresh(self) -> None:
        try:
            self.rows()
        finally:
            self._reading.release()

    def _shown(self) -> Rows:
        return {layer: rows[: self._routed] for layer, rows in sorted(self._total.items())}


def _less(rows: list[int], before: list[int] | None) -> list[int]:
    return rows if before is None else [one - old for one, old in zip(rows, before, strict=True)]
