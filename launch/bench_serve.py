"""`moe-nvfp4 bench serve`: requests at given rates to any server that speaks OpenAI's HTTP API.

The loop is open: a request is sent when it is due, whoever else still waits for an answer, and times count from when it
was due. How late this program itself was is measured too, and said when it is too late to trust the figures.
"""

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Final

import httpx

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.bench_serve_offline import quantiles
from moe_nvfp4.launch.load_client import Outcome, Target
from moe_nvfp4.launch.serve_load import Load

LATE = 0.02  # seconds of our own lag at p99, from which on figures are not to be trusted
LEAD = 0.5  # seconds for clients to start and to read what they shall send
LONGEST_LINE = 2**30
NOTICED = 0.5  # seconds in which a server learns that a client has left
TAKEN: Final = {
    "process_resident_memory_bytes": ("GB of memory", 1e9),
    "moe_nvfp4_device_memory_bytes": ("GB of device memory", 1e9),
    "process_open_fds": ("open files", 1),
    "moe_nvfp4_requests_running": ("answers running", 1),
    "moe_nvfp4_pages_held": ("pages held", 1),
}
FINENESS = 1.1  # the search ends when the rate that is too high is less than so many times the one that is not


async def bench_serve(
    target: Target,
    load: Load,
    rates: Sequence[float],
    report: Callable[[str], None],
    *,
    limit: float = 1.0,
    search: bool = False,
    processes: int = 1,
) -> dict[str, Any]:
    """Figures at each rate. With `search`, the rates are where to begin; the largest rate follows at which p99 of the
    time to first token is at most `limit` seconds and nothing fails."""
    load.check()
    if processes < 1:
        raise RequestError(f"--processes: got {processes}; expected at least 1")
    model = target.model or await _first_model(target)
    clients = [await _client() for _ in range(processes)]
    try:
        await _warm_up(clients, target, load.bodies(model, target.chat, 0.0))
        before = await taken(target)
        report(HEAD)

        async def run(rate: float) -> dict[str, Any]:
            bodies = load.bodies(model, target.chat, rate)
            outcomes, lags = await send(clients, target, load.arrivals(rate), bodies, load.patience(rate))
            if load.leaving:
                await asyncio.sleep(NOTICED)
            figures = summary(outcomes, lags, limit) | {"taken": await taken(target)}
            report(row(rate, figures))
            return {"rate": rate} | figures

        results = [await run(rate) for rate in rates]
        largest = await _search(run, results, limit) if search else None
    finally:
        for client in clients:
            client.kill()
            await client.wait()
    if largest is not None:
        report(f"largest rate with p99 of the time to first token at most {limit:g} s: {largest:.3g} requests a second")
    elif search:
        report(f"no rate was found at which p99 of the time to first token is at most {limit:g} s")
    return {"target": target.base, "model": model, "load": asdict(load), "limit": limit, "taken": before} | {
        "rates": sorted(results, key=lambda one: one["rate"]),
        "largest_rate": largest,
    }


async def _client() -> Process:
    """Takes requests and gives outcomes, a line of JSON for each rate."""
    program = (sys.executable, "-m", "moe_nvfp4.launch.load_client")
    return await asyncio.create_subprocess_exec(*program, stdin=PIPE, stdout=PIPE, limit=LONGEST_LINE)


async def send(
    clients: Sequence[Process],
    target: Target,
    arrivals: Sequence[float],
    bodies: Sequence[dict[str, Any]],
    patience: Sequence[int | None],
) -> tuple[list[Outcome], list[float]]:
    """Each client gets every so manieth request, so each of them sees a Poisson process as well."""
    began = time.monotonic() + LEAD

    async def part(number: int, client: Process) -> Any:
        assert client.stdin is not None and client.stdout is not None
        dues = [began + arrival for arrival in arrivals[number :: len(clients)]]
        job = {"target": asdict(target), "dues": dues}
        job |= {"bodies": bodies[number :: len(clients)], "patience": patience[number :: len(clients)]}
        client.stdin.write(json.dumps(job).encode() + b"\n")
        await client.stdin.drain()
        return json.loads(await client.stdout.readline())

    answers = await asyncio.gather(*(part(number, client) for number, client in enumerate(clients)))
    outcomes = [Outcome(**outcome) for answer in answers for outcome in answer["outcomes"]]
    return outcomes, [lag for answer in answers for lag in answer["lags"]]


def summary(outcomes: Sequence[Outcome], lags: Sequence[float], limit: float) -> dict[str, Any]:
    whole = [one for one in outcomes if one.problem is None and not one.left]
    seconds = max(one.due + one.end for one in outcomes) - min(one.due for one in outcomes)
    firsts = [one.arrivals[0] for one in whole if one.arrivals]
    tokens = sum(one.tokens_out or len(one.arrivals) for one in whole)
    return {
        "requests": len(outcomes),
        "completed": len(whole),
        "left": sum(one.left for one in outcomes),
        "problems": dict(Counter(one.problem for one in outcomes if one.problem)),
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds,
        "within_limit_per_second": sum(first <= limit for first in firsts) / seconds,
        "tokens_in": sum(one.tokens_in for one in whole),
        "tokens_out": tokens,
        "output_tokens_per_second": tokens / seconds,
        "first_token": quantiles(firsts),
        "between_tokens": quantiles([b - a for one in whole for a, b in pairwise(one.arrivals)]),
        "end_to_end": quantiles([one.end for one in whole]),
        "own_lag": quantiles(lags),
        "late": quantiles(lags)["p99"] > LATE,
    }


QUANTILES = "     p50     p90     p99"
HEAD = (
    " req/s |  done | refused | failed | out tok/s "
    "| to first token, s       | between tokens, ms      | end to end, s\n"
    f" asked |       | 429 503 |        |           |{QUANTILES} |{QUANTILES} |{QUANTILES}"
)


def row(rate: float, figures: dict[str, Any]) -> str:
    problems = figures["problems"]
    busy = [problems.get("429", 0), problems.get("503", 0)]
    failed = figures["requests"] - figures["completed"] - figures["left"] - sum(busy)

    def three(kind: str, scale: float = 1.0) -> str:
        return " ".join(f"{scale * figures[kind][at]:>7.{2 if scale == 1 else 1}f}" for at in ("p50", "p90", "p99"))

    line = (
        f"{rate:>6.3g} | {figures['completed']:>5} | {busy[0]:>3} {busy[1]:>3} | {failed:>6} | "
        f"{figures['output_tokens_per_second']:>9,.0f} | "
        f"{three('first_token')} | {three('between_tokens', 1e3)} | {three('end_to_end')}"
    )
    if failed:
        others = {name: count for name, count in problems.items() if name not in ("429", "503")}
        line += f"\n       failed: {', '.join(f'{name} {count}' for name, count in others.items())}"
    if figures["left"]:
        line += f"\n       {figures['left']} clients left before their answer was complete"
    if figures.get("taken"):
        line += (
            f"\n       the server has {', '.join(f'{value:,.2f} {unit}' for unit, value in figures['taken'].items())}"
        )
    if figures["late"]:
        late = 1e3 * figures["own_lag"]["p99"]
        line += f"\n       this program was {late:.0f} ms late at p99: it, not the server, may be what is slow here"
    return line


async def _search(
    run: Callable[[float], Awaitable[dict[str, Any]]], results: list[dict[str, Any]], limit: float
) -> float | None:
    """Doubles or halves the rate until the limit lies between two, then halves what is between, on a logarithmic
    scale. What runs is added to `results`."""

    def good(figures: dict[str, Any]) -> bool:
        return not figures["problems"] and bool(figures["completed"]) and figures["first_token"]["p99"] <= limit

    async def keeps(rate: float) -> bool:
        results.append(await run(rate))
        return good(results[-1])

    bad = min((one["rate"] for one in results if not good(one)), default=None)
    fine = max((one["rate"] for one in results if good(one) and (bad is None or one["rate"] < bad)), default=None)
    for _ in range(20):
        if fine is None:
            assert bad is not None
            rate = bad / 2
        else:
            rate = 2 * fine if bad is None else (fine * bad) ** 0.5
        if fine is not None and bad is not None and bad / fine < FINENESS:
            break
        if await keeps(rate):
            fine = rate
        else:
            bad = rate
    return fine


async def taken(target: Target) -> dict[str, float]:
    """What the server has of its machine, where its metrics say so: the same after ten minutes as after one."""
    async with httpx.AsyncClient(timeout=target.timeout) as client:
        try:
            text = (await client.get(target.base.removesuffix("/v1") + "/metrics")).raise_for_status().text
        except httpx.HTTPError:
            return {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.replace("{", " ").rpartition(" ")
        for metric, (unit, scale) in TAKEN.items():
            if name.split(" ")[0] == metric:
                found[unit] = found.get(unit, 0.0) + float(value) / scale
    return found


async def _first_model(target: Target) -> str:
    try:
        async with httpx.AsyncClient(headers=target.headers) as client:
            response = await client.get(f"{target.base}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise RequestError(
            f"{target.base}/models: {error!s:.200}; expected a server with OpenAI's API there, or give --model"
        ) from None


async def _warm_up(clients: Sequence[Process], target: Target, bodies: Sequence[dict[str, Any]]) -> None:
    """A request through each client, one after the other: the first answers are slow for other reasons than load, and
    a wrong address is known at once."""
    for client, body in zip(clients, bodies, strict=False):
        (outcome,), _ = await send([client], target, [0.0], [body], [None])
        if outcome.problem is not None:
            raise RequestError(f"{target.path}: {outcome.problem}: {outcome.detail}; expected a streamed answer")
