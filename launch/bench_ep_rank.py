"""One rank of `moe-nvfp4 bench ep`, in a process of its own. It tells the bench how far it is in lines of JSON."""

import json
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any, Final, TypedDict

import torch
import torch.distributed as dist

from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.errors import EngineError, MoeNvfp4Error
from moe_nvfp4.launch.bench_exchanges import CountedCollectives, exchange_table, exchanges_of_a_step, time_exchanges
from moe_nvfp4.launch.bench_model import (
    TIMED_STEPS,
    WARM_UP_STEPS,
    Shares,
    after,
    places,
    prefilled,
    timed_steps,
)
from moe_nvfp4.launch.rendezvous import Place, end_of_start, find_store, join_ranks
from moe_nvfp4.parallel import ALONE, Ranks
from moe_nvfp4.runner import MoERunner

CHECKED_STEPS: Final = 8
CHECKED_TOKENS: Final = 20  # the likeliest, of one rank
# How far a token that is not one rank's may lie behind its best, of the way to its 20th: ranks add up in another order.
# In float32 two tokens are seldom so near each other that it matters; bfloat16 has 8 bits.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.2}


class Checked(TypedDict):
    """Greedy tokens of a few steps of a batch, and what was likeliest there."""

    tokens: list[list[int]]  # [steps][batch]
    ids: list[list[list[int]]]  # [steps][batch][CHECKED_TOKENS]
    logprobs: list[list[list[float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`seconds`: most that a rank takes for anything but its start."""

    model: str
    device: str  # cpu or cuda; there rank N has GPU N
    dtype: str
    batches: tuple[int, ...]
    context: int
    check: bool
    explain: bool
    symmetric: bool
    start_seconds: float = 1800.0
    seconds: float = 300.0


def run_rank(place: Place, settings: Settings, expected: Sequence[Checked] | None, end: Connection) -> None:
    """`expected`: one rank's, of each batch; without it this is the one, if tokens are checked. Sends the time "at"
    every stage, and "line", "figures", "error" or "refused"."""

    def tell(**what: Any) -> None:
        with suppress(OSError):  # nobody listens any more
            end.send_bytes(json.dumps({"at": time.monotonic(), **what}).encode())

    threading.Thread(target=_end_with_the_bench, daemon=True).start()
    try:
        figures = Rank(place, settings, tell).measure(expected)
        tell(figures=figures if place.rank == 0 else {})
    except Exception as error:
        if isinstance(error, MoeNvfp4Error) and not isinstance(error, EngineError):
            tell(refused=str(error), kind=type(error).__name__)
        else:
            tell(error=traceback.format_exc().strip())
    with suppress(EOFError, OSError):
        end.recv_bytes()  # a rank that leaves early would break what others still do
    os._exit(0)  # graphs that hold collectives can hang when they are taken down in a wrong order


def _end_with_the_bench() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Rank:
    """A model that is loaded, of which all ranks measure the same things in the same order."""

    def __init__(self, place: Place, settings: Settings, tell: Callable[..., None]):
        self._settings, self._place, self._tell = settings, place, tell
        device = torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", place.rank)
        self._ranks: Ranks = ALONE
        self._counted: CountedCollectives | None = None
        if place.size > 1:
            if settings.device == "cpu":
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.size))
            ranks = join_ranks(place, device, find_store(place), symmetric=settings.symmetric)
            assert ranks.collectives is not None
            self._collectives, self._counted = ranks.collectives, CountedCollectives(ranks.collectives)
            self._ranks = replace(ranks, collectives=self._counted)
        prepared = MoERunner.prepare(
            settings.model,
            device=device,
            dtype=settings.dtype,
            max_batch_size=max(settings.batches),
            max_seq_len=places(settings.context),
            buckets=sorted({self._shares(batch).counts[0] for batch in settings.batches}),
            verbose=place.rank == 0,
            ranks=self._ranks,
        )
        self._runner = MoERunner(prepared)
        if place.size > 1:
            dist.barrier()
            end_of_start(place)
            self._report(f"  loaded in {self._runner.load_seconds:.1f} s; {type(self._collectives).__name__}")
        tell()

    def measure(self, expected: Sequence[Checked] | None) -> dict[str, Any]:
        """Times only where tokens are as expected."""
        figures: dict[str, Any] = {"load_seconds": self._runner.load_seconds}
        if self._settings.check:
            batches = self._settings.batches
            found = [self._checked(batch, expected[i] if expected else None) for i, batch in enumerate(batches)]
            if expected is None:
                figures["checked"] = found
            else:
                figures["check"] = checks = [compare(*pair) for pair in zip(found, expected, strict=True)]
                figures["check_passed"] = all(check["behind"] <= TOLERANCE[self._runner.dtype] for check in checks)
                self._report(self._verdict(checks))
                if not figures["check_passed"]:
                    return figures
        figures["decode"] = [self._timed(batch) for batch in self._settings.batches]
        return figures

    def _report(self, line: str) -> None:
        if self._place.rank == 0:
            self._tell(line=line)

    def _verdict(self, checks: Sequence[dict[str, float]]) -> str:
        same = ", ".join(f"{check['same']:.1%}" for check in checks)
        behind, tolerance = max(check["behind"] for check in checks), TOLERANCE[self._runner.dtype]
        words = "" if behind <= tolerance else f", more than {tolerance:g}: other tokens, so nothing is timed"
        return f"  tokens as one rank's: {same}; others at most {behind:.2g} of the way to its 20th{words}"

    def _shares(self, batch: int) -> Shares:
        return Shares.of(batch, self._ranks)

    def _checked(self, batch: int, expected: Checked | None) -> Checked:
        """Each step goes on from one rank's tokens: one that differs by a rounding does not change all that follow."""
        shares, runner = self._shares(batch), self._runner
        found: Checked = {"tokens": [], "ids": [], "logprobs": []}

        def steps(rows: Sequence[DecodeRow]) -> None:
            last, slots = runner.stepper.last_tokens, [row.slot for row in rows]
            before = list(range(batch))  # instead of what prompts gave, which may differ as well
            for step in range(CHECKED_STEPS):
                last[slots] = last.new_tensor([before[index] for index in shares.here])
                result = runner.stepper.decode(after(rows, step), None, CHECKED_TOKENS, None, shares.whole())
                found["tokens"].append(result.wait()[0])
                assert result.logprobs is not None
                found["ids"].append(result.logprobs.ids_BK.tolist())
                found["logprobs"].append(result.logprobs.values_BK.tolist())
                before = (expected or found)["tokens"][step]

        with prefilled(runner, shares, self._settings.context) as rows:
            runner.engine.call(partial(steps, rows))
        self._tell()
        return found

    def _timed(self, batch: int) -> dict[str, Any]:
        shares, runner, context = self._shares(batch), self._runner, self._settings.context
        with prefilled(runner, shares, context) as rows:
            self._tell()
            times = runner.engine.call(partial(timed_steps, runner, rows, shares.whole()))
            median = statistics.median(times)
            figures: dict[str, Any] = {
                "batch": batch,
                "milliseconds": median,
                "low": min(times),
                "high": max(times),
                "tokens_per_second": 1e3 * batch / median,
            }
            if runner.device.type == "cuda":
                figures["peak_bytes"] = torch.cuda.max_memory_allocated(runner.device)
            self._report(_line(figures))
            if self._counted is not None and self._settings.explain:
                later = after(rows, WARM_UP_STEPS + TIMED_STEPS)
                figures["exchanges"] = runner.engine.call(partial(self._exchanges, later, shares, median))
                self._report(exchange_table(figures["exchanges"]))
        self._tell()
        return figures

    def _exchanges(self, rows: Sequence[DecodeRow], shares: Shares, step: float) -> list[dict[str, Any]]:
        assert self._counted is not None
        seen = exchanges_of_a_step(self._runner, self._counted, rows, shares.whole())
        device, size, layers = self._runner.device, self._ranks.size, self._runner.model.num_layers
        return time_exchanges(seen, self._collectives, device, size=size, layers=layers, step=step)


def _line(figures: dict[str, Any]) -> str:
    peak = f"  peak {figures['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in figures else ""
    return (
        f"  batch {figures['batch']:>4}{figures['milliseconds']:>9.3f} ms "
        f"({figures['low']:.3f} to {figures['high']:.3f}){figures['tokens_per_second']:>9.0f} tok/s{peak}"
    )


def compare(found: Checked, expected: Checked) -> dict[str, float]:
    """`same`: share of tokens. `behind`: of those that differ the worst, as a share of the way from one rank's best
    logprob to its last one known; 1 also stands for further."""
    pairs, behind = 0, []
    for step, tokens in enumerate(found["tokens"]):
        for row, token in enumerate(tokens):
            pairs += 1
            if token != expected["tokens"][step][row]:
                ids, logprobs = expected["ids"][step][row], expected["logprobs"][step][row]
                gap, way = logprobs[0] - logprobs[ids.index(token) if token in ids else -1], logprobs[0] - logprobs[-1]
                behind.append(gap / way if way else 1.0)
    return {"same": 1 - len(behind) / pairs, "behind": max(behind, default=0.0)}
