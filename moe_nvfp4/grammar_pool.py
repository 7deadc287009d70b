"""Processes that try grammars out before this one compiles them: started when needed, killed at a limit, replaced.

Only bytes and JSON pass between them. A worker whose parent has died reads the end of its input and ends.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, Final

from moe_nvfp4.errors import EngineError, RequestError
from moe_nvfp4.sampling import Constraint

WORKERS: Final = 2  # that compile at once, and one in reserve; each holds some 300 MB
COMPILE_SECONDS: Final = 10.0
FAIR_SECONDS: Final = 2.0  # after which a grammar makes room if another one waits
WAIT_SECONDS: Final = 30.0  # for a worker
MAX_WAITING: Final = 32
START_SECONDS: Final = 120.0  # to import the library, on a machine that is busy
RESERVE_SECONDS: Final = 1.0  # a grammar that takes longer may end its worker, so another one starts, which takes 3 s
MEMORY_BYTES: Final = 512 << 20  # for one grammar


class Worker:
    """One process. `try_out` is for one thread at a time; `kill` for any."""

    def __init__(self) -> None:
        # With the places to import from that this process has; none of its GPUs, and one thread.
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moe_nvfp4.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            process_group=0,
        )
        self.pid = self._process.pid
        self.opened = False
        self.began: float | None = None  # when its grammar was
        self.killed = self.displaced = self.silent = False

    def open(self, opening: bytes) -> bool:
        self.opened = self.opened or self._ask(opening, START_SECONDS) is not None
        return self.opened

    def try_out(self, constraint: Constraint, seconds: float) -> dict[str, Any] | None:
        """None if it was killed, or ended by itself."""
        job = {"kind": constraint.kind, "text": constraint.text, "seconds": seconds, "bytes": MEMORY_BYTES}
        self.began = time.monotonic()
        try:
            return self._ask(json.dumps(job).encode() + b"\n", seconds)
        finally:
            self.began = None

    def _ask(self, message: bytes, seconds: float) -> dict[str, Any] | None:
        limit = threading.Timer(seconds, self.kill)
        limit.daemon = True
        limit.start()
        try:
            pipe_in, pipe_out = self._pipes
            pipe_in.write(message)
            pipe_in.flush()
            line = pipe_out.readline()
            answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):  # it has ended; a pipe that was closed is a ValueError
            answer = None
        finally:
            limit.cancel()
            limit.join()
        self.silent = answer is None
        return answer

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    @property
    def is_alive(self) -> bool:
        # The pipes of a process that is killed close some time before it counts as ended.
        return not (self.killed or self.silent) and self._process.poll() is None

    def kill(self) -> None:
        self.killed = True
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes:
            with suppress(OSError):  # what was not written has no reader
                pipe.close()


class WorkerPool:
    """For one vocabulary. Any thread may call."""

    def __init__(self, vocabulary: Sequence[bytes], eos: Sequence[int]):
        self._changed = threading.Condition()
        self._idle, self._busy = list[Worker](), list[Worker]()
        self._waiting, self._closed = 0, False
        head = {"sizes": [len(token) for token in vocabulary], "eos": list(eos)}
        self._opening = json.dumps(head).encode() + b"\n" + b"".join(vocabulary)

    def try_out(self, constraint: Constraint) -> None:
        """Raises where it cannot be compiled, not in time, not in the memory it may take, or not be followed."""
        worker, seconds = self._take(constraint), COMPILE_SECONDS
        reserve = threading.Timer(RESERVE_SECONDS, self._start_reserve)
        reserve.daemon = True
        try:
            opened = worker.open(self._opening)
            reserve.start()
            answer = worker.try_out(constraint, seconds) if opened else None
        finally:
            reserve.cancel()
            self._give_back(worker)
        if self._closed:
            raise EngineError("the runner is closed")
        if not opened:
            raise EngineError("the process that compiles grammars did not start; try `import xgrammar` in this Python")
        if answer is None:
            why = "its compiling ended the process that did it, most likely for want of memory"
            if worker.displaced:
                why = f"not compiled within {FAIR_SECONDS:g} s, while others wait"
            elif worker.killed:
                why = f"not compiled within {seconds:g} s"
            raise RequestError(f"SamplingParams.{constraint.kind}: {why}; make it simpler")
        if answer["refused"] is not None:
            raise RequestError(answer["refused"])

    def close(self) -> None:
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()  # who waits for it ends it
            self._changed.notify_all()
        for worker in idle:
            worker.end()

    @property
    def pids(self) -> list[int]:
        with self._changed:
            return [worker.pid for worker in (*self._idle, *self._busy)]

    def _take(self, constraint: Constraint) -> Worker:
        latest = time.monotonic() + WAIT_SECONDS
        with self._changed:
            crowded = RequestError(f"SamplingParams.{constraint.kind}: too many grammars are being compiled; retry")
            if self._waiting >= MAX_WAITING:
                raise crowded
            self._waiting += 1
            try:
                while len(self._busy) >= WORKERS and not self._closed:
                    now = time.monotonic()
                    if now >= latest:
                        raise crowded
                    self._changed.wait(min(self._make_room(now), latest - now))
            finally:
                self._waiting -= 1
            if self._closed:
                raise EngineError("the runner is closed")
            worker = self._ready_or_new()
            self._busy.append(worker)
            return worker

    def _ready_or_new(self) -> Worker:
        while self._idle:
            if (worker := self._idle.pop()).is_alive:
                return worker
            worker.end()  # somebody else has killed it
        return Worker()

    def _make_room(self, now: float) -> float:
        """Kills the worker whose grammar has taken longest, if it had its time. Seconds until it is worth a look."""
        running = [worker for worker in self._busy if not worker.killed and worker.began is not None]
        leaving = sum(worker.killed for worker in self._busy)
        oldest = min(running, key=lambda worker: worker.began or 0.0, default=None)
        if oldest is None or oldest.began is None or leaving >= self._waiting:
            return FAIR_SECONDS
        if (left := oldest.began + FAIR_SECONDS - now) > 0:
            return left
        oldest.displaced = True
        oldest.kill()
        return FAIR_SECONDS

    def _give_back(self, worker: Worker) -> None:
        alive = worker.is_alive
        if not alive:
            worker.end()
        with self._changed:
            self._busy.remove(worker)
            if alive and not self._closed:
                self._idle.append(worker)
            self._changed.notify()
        if worker.opened and not alive:
            self._start_reserve()
        if alive and self._closed:
            worker.end()

    def _start_reserve(self) -> None:
        with self._changed:
            if not self._closed and not self._idle and len(self._busy) <= WORKERS:
                self._idle.append(Worker())
                self._changed.notify()
