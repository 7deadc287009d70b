"""Bytes from one rank to the others, in one direction, over TCP.

Who connects shows a key that the ranks of a group share, so that a stray connection, or a rank of a group that is
gone, is not taken for one of ours. Nothing is encrypted, as with the collectives beside it.
"""

import hashlib
import hmac
import socket
import struct
import time
from typing import Final

_LENGTH: Final = struct.Struct("<I")
_HELLO: Final = struct.Struct("<I32s")  # rank, digest of key and rank
SECONDS_TO_SAY_HELLO: Final = 5.0


def _digest(key: bytes, rank: int) -> bytes:
    return hmac.digest(key, b"rank %d" % rank, hashlib.sha256)


class Lines:
    """Rank 0's end: it listens from the start on, at a free port, and `accept` waits for the others."""

    def __init__(self, host: str, key: bytes):
        self.key, self._lines = key, list[socket.socket]()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self.port: int = self._server.getsockname()[1]

    def accept(self, followers: int, seconds: float, send_seconds: float | None = None) -> None:
        """`send_seconds`: one that reads nothing for so long is gone."""
        deadline, found = time.monotonic() + seconds, dict[int, socket.socket]()
        while len(found) < followers:
            self._server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line, _ = self._server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, followers + 1)) - set(found))
                raise TimeoutError(f"ranks {missing} have not connected within {seconds:g} s") from None
            try:
                line.settimeout(SECONDS_TO_SAY_HELLO)
                rank, shown = _HELLO.unpack(_read(line, _HELLO.size))
            except (OSError, struct.error):
                line.close()
                continue
            if not hmac.compare_digest(shown, _digest(self.key, rank)):
                line.close()
                continue
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.settimeout(send_seconds or seconds)
            found[rank] = line
        self._server.close()
        self._lines = [found[rank] for rank in sorted(found)]

    def send(self, message: bytes) -> None:
        framed = _LENGTH.pack(len(message)) + message
        for rank, line in enumerate(self._lines, start=1):
            try:
                line.sendall(framed)
            except OSError as error:
                raise ConnectionError(f"rank {rank} has gone, or takes no orders: {error}") from None

    def close(self) -> None:
        for line in (self._server, *self._lines):
            line.close()


class Line:
    """The end of another rank. A leader that says nothing for `start_seconds`, or once it has spoken for `seconds`, is
    gone."""

    def __init__(self, host: str, port: int, key: bytes, rank: int, seconds: float, start_seconds: float | None = None):
        self._seconds = seconds
        self._line = socket.create_connection((host, port), timeout=start_seconds or seconds)
        self._line.sendall(_HELLO.pack(rank, _digest(key, rank)))

    def receive(self) -> bytes:
        try:
            (length,) = _LENGTH.unpack(_read(self._line, _LENGTH.size))
            message = _read(self._line, length)
        except TimeoutError:
            raise TimeoutError(f"rank 0 has sent nothing for {self._line.gettimeout():g} s") from None
        self._line.settimeout(self._seconds)
        return message

    def close(self) -> None:
        try:
            self._line.shutdown(socket.SHUT_RDWR)  # wakes who waits in `receive`
        except OSError:
            return
        finally:
            self._line.close()


def _read(line: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = line.recv(count - len(parts))
        if not part:
            raise ConnectionError("rank 0 has gone")
        parts += part
    return bytes(parts)
