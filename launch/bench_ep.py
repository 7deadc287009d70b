"""`moe-nvfp4 bench ep`: decode steps of one model over N ranks of this machine, in each attention mode, against one.

Every mode gets processes of its own, one for each rank; Ray is not needed. The procedure is that of `bench decode`.
"""

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, cast, get_args

import torch

from moe_nvfp4.errors import EngineError, MemoryPlanError, RequestError
from moe_nvfp4.launch.bench_ep_rank import Checked, Settings, run_rank
from moe_nvfp4.launch.rendezvous import Place, open_store
from moe_nvfp4.parallel import AttentionMode

HOST: Final = "127.0.0.1"
AFTERMATH: Final = 1.0  # seconds in which all that fail because one has failed have said so
GOODBYE: Final = 5.0
Report = Callable[[str], None]


class Refused(RequestError):
    """Something that the ranks cannot do, though nothing has failed; `kind` names the error's class."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def bench_ep(settings: Settings, ranks: int, modes: Sequence[str], report: Report) -> dict[str, Any]:
    """Figures of one rank, and of all ranks in each mode. A mode that is refused, or whose tokens are not one rank's,
    has no times."""
    _check(settings, ranks, modes)
    results: dict[str, dict[str, Any]] = {}
    expected: list[Checked] | None = None
    try:
        results["one rank"] = run_ranks(settings, 1, "replicated", None, report)
        expected = results["one rank"].pop("checked", None)
    except Refused as error:
        if error.kind != MemoryPlanError.__name__ or settings.check:
            raise
        report(f"  {error}")
    for mode in cast(Sequence[AttentionMode], modes):
        try:
            results[mode] = run_ranks(settings, ranks, mode, expected, report)
        except Refused as error:
            report(f"  {error}")
            results[mode] = {"refused": str(error)}
    report(table(results, settings.batches, ranks))
    return results


def _check(settings: Settings, ranks: int, modes: Sequence[str]) -> None:
    if settings.device not in ("cpu", "cuda"):
        raise RequestError(f"--device: got {settings.device!r:.40}; expected cpu, or cuda, where rank N takes GPU N")
    known = [mode for mode in get_args(AttentionMode) if mode != "auto"]
    if not modes or len(set(modes)) < len(modes) or not all(mode in known for mode in modes):
        raise RequestError(f"--attention: got {','.join(modes)!r:.80}; expected some of {','.join(known)}")
    if ranks < 2:
        raise RequestError(f"--ranks: got {ranks}; expected at least 2, beside the one rank that is always measured")
    if settings.device == "cuda" and ranks > torch.cuda.device_count():
        raise RequestError(
            f"--ranks: got {ranks}; expected at most {torch.cuda.device_count()}, the GPUs of this machine"
        )


def run_ranks(
    settings: Settings, size: int, mode: AttentionMode, expected: Sequence[Checked] | None, report: Report
) -> dict[str, Any]:
    """The figures of rank 0. Ends all processes, whatever happens."""
    context = multiprocessing.get_context("spawn")
    store = open_store(HOST)
    report("one rank" if size == 1 else f"{size} ranks, attention {mode}")
    ends, processes = [], []
    try:
        for rank in range(size):
            place = Place(rank, size, HOST, store.port, mode, settings.seconds, settings.start_seconds)
            end, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(place, settings, expected, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a rank's death is an end of file here
            ends.append(end)
            processes.append(process)
        figures = Watch(settings, processes, ends, report).figures()
        for end in ends:
            end.send_bytes(b"")
        for process in processes:
            process.join(GOODBYE)
        return figures
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


class Watch:
    """Listens to the ranks until all have their figures or one has failed."""

    def __init__(
        self, settings: Settings, processes: Sequence[BaseProcess], ends: Sequence[Connection], report: Report
    ):
        self._settings, self._processes, self._report = settings, processes, report
        self._open = {end: rank for rank, end in enumerate(ends)}  # of ranks that have not finished
        self._heard = dict.fromkeys(range(len(ends)), time.monotonic())
        self._started: set[int] = set()
        self._figures: dict[str, Any] = {}
        self._failures: list[tuple[float, int, dict[str, Any]]] = []  # when, of which rank

    def figures(self) -> dict[str, Any]:
        while self._open and not self._failures:
            self._listen(1.0)
            for rank in self._open.values():
                limit = self._settings.seconds if rank in self._started else self._settings.start_seconds
                if not self._failures and time.monotonic() - self._heard[rank] > limit + AFTERMATH:
                    raise EngineError(f"{self._name(rank)} hangs: nothing has been heard of it for {limit:g} s")
        if self._failures:
            self._fail()
        return self._figures

    def _listen(self, seconds: float) -> None:
        for end in wait(list(self._open), seconds):
            assert isinstance(end, Connection)
            rank = self._open[end]
            try:
                message = json.loads(end.recv_bytes())
            except (EOFError, OSError):
                del self._open[end]
                self._failures.append((0.0, rank, {"died": True}))  # the cause of whatever others say
                continue
            self._heard[rank] = time.monotonic()
            self._started.add(rank)
            if "line" in message:
                self._report(message["line"])
            if "figures" in message:
                self._figures |= message["figures"]
                del self._open[end]
            elif "error" in message or "refused" in message:
                del self._open[end]
                self._failures.append((message["at"], rank, message))

    def _fail(self) -> None:
        until = time.monotonic() + AFTERMATH
        while self._open and (left := until - time.monotonic()) > 0:
            self._listen(left)
        refusals = [failure for failure in self._failures if "refused" in failure[2]]
        _, rank, message = min(refusals or self._failures, key=lambda failure: failure[:2])
        if "refused" in message:
            raise Refused(message["refused"], message["kind"])
        if "died" in message:
            process = self._processes[rank]
            process.join(GOODBYE)
            raise EngineError(f"{self._name(rank)} died: {_ending(process.exitcode)}")
        silent = f"\nNothing was heard of rank {', '.join(map(str, self._open.values()))}." if self._open else ""
        raise EngineError(f"{self._name(rank)} raised\n{message['error']}{silent}")

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {len(self._processes)}"


def _ending(exitcode: int | None) -> str:
    if exitcode is None:
        return "it does not answer"
    return f"signal {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"


def table(results: dict[str, dict[str, Any]], batches: Sequence[int], ranks: int) -> str:
    """Of each mode and batch ms a step, tok/s, and how many times one rank's that is."""
    alone = {one["batch"]: one["tokens_per_second"] for one in results.get("one rank", {}).get("decode", ())}
    lines = [f"{ranks} ranks: ms a step, tok/s", f"{'batch':<12}" + "".join(f"{batch:>27}" for batch in batches)]
    for name, figures in results.items():
        cells, found = [], {one["batch"]: one for one in figures.get("decode", ())}
        for batch in batches:
            if batch not in found:
                cells.append("-")
                continue
            rate = found[batch]["tokens_per_second"]
            times = f"{rate / alone[batch]:>6.2f}x" if batch in alone and name != "one rank" else ""
            cells.append(f"{found[batch]['milliseconds']:>9.3f}{rate:>10.0f}{times:<7}")
        lines.append(f"{name:<12}" + "".join(f"{cell:>27}" for cell in cells))
    return "\n".join(lines)


def is_complete(results: dict[str, dict[str, Any]]) -> bool:
    return all("decode" in figures for figures in results.values())
