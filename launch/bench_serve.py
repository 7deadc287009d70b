"""`moe-nvfp4 bench serve`: requests at given rates to any server that speaks OpenAI's HTTP API.

The loop is open: a request is sent when it is due, whoever else still waits for an answer, and times count from when it
was due. How late this program itself was is measured too, and said when it is too late to trust the figures.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.bench_serve_offline import quantiles
from moe_nvfp4.launch.serve_load import Load

LATE = 0.02  # seconds of our own lag at p99, from which on figures are not to be trusted
BEAT = 0.01  # seconds between two looks at the clock
WARM_UP = 4  # requests that are not counted
FINENESS = 1.1  # the search ends when the rate that is too high is less than so many times the one that is not


@dataclass(frozen=True, slots=True)
class Target:
    url: str  # ends before /v1, or with it
    model: str | None = None  # None: the first that the server names
    key: str | None = None
    chat: bool = False
    timeout: float = 600.0

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    @property
    def path(self) -> str:
        return f"{self.base}/{'chat/completions' if self.chat else 'completions'}"


@dataclass(slots=True)
class Outcome:
    """Of one request, in seconds from when it was due."""

    due: float
    arrivals: list[float] = field(default_factory=list)  # of pieces of text
    end: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    finished: bool = False
    problem: str | None = None  # what kept it from being a whole answer


async def bench_serve(
    target: Target, load: Load, rates: Sequence[float], limit: float, search: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    """Figures at each rate. With `search`, the rates are where to begin; the largest rate follows at which p99 of the
    time to first token is at most `limit` seconds and nothing fails."""
    load.check()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    async with httpx.AsyncClient(limits=limits, headers=headers, timeout=target.timeout) as client:
        model = target.model or await _first_model(client, target)
        await _warm_up(client, target, load.bodies(model, target.chat, 0.0))
        report(HEAD)

        async def run(rate: float) -> dict[str, Any]:
            bodies = load.bodies(model, target.chat, rate)
            figures = await at_rate(client, target, bodies, load.arrivals(rate), limit)
            report(row(rate, figures))
            return {"rate": rate} | figures

        results = [await run(rate) for rate in rates]
        largest = await _search(run, results, limit) if search else None
    if largest is not None:
        report(f"largest rate with p99 of the time to first token at most {limit:g} s: {largest:.3g} requests a second")
    elif search:
        report(f"no rate was found at which p99 of the time to first token is at most {limit:g} s")
    return {"target": target.base, "model": model, "load": asdict(load), "limit": limit} | {
        "rates": sorted(results, key=lambda one: one["rate"]),
        "largest_rate": largest,
    }


async def at_rate(
    client: httpx.AsyncClient, target: Target, bodies: Sequence[dict[str, Any]], arrivals: Sequence[float], limit: float
) -> dict[str, Any]:
    began = time.perf_counter()
    lags: list[float] = []
    tasks: list[asyncio.Task[None]] = []
    outcomes = [Outcome(began + arrival) for arrival in arrivals]
    heart = asyncio.create_task(_beat(lags))
    try:
        for outcome, body in zip(outcomes, bodies, strict=True):
            await asyncio.sleep(max(0.0, outcome.due - time.perf_counter()))
            lags.append(time.perf_counter() - outcome.due)
            tasks.append(asyncio.create_task(_ask(client, target, body, outcome)))
        await asyncio.gather(*tasks)
    finally:
        for task in (heart, *tasks):
            task.cancel()
    return summary(outcomes, lags, limit)


async def _ask(client: httpx.AsyncClient, target: Target, body: dict[str, Any], outcome: Outcome) -> None:
    try:
        async with asyncio.timeout(target.timeout), client.stream("POST", target.path, json=body) as response:
            if response.status_code != 200:
                outcome.problem = str(response.status_code)
                return
            rest = b""
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and b"[DONE]" not in line:
                        _take(json.loads(line[5:]), outcome)
            if outcome.problem is None and not outcome.finished:
                outcome.problem = "cut off"
    except TimeoutError:
        outcome.problem = "timeout"
    except httpx.HTTPError as error:
        outcome.problem = type(error).__name__
    except ValueError:
        outcome.problem = "not JSON"
    finally:
        outcome.end = time.perf_counter() - outcome.due


def _take(event: dict[str, Any], outcome: Outcome) -> None:
    if "error" in event:
        outcome.problem = "error in the stream"
    if usage := event.get("usage"):
        outcome.tokens_in, outcome.tokens_out = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or choice
        if any(delta.get(key) for key in ("content", "text", "reasoning_content", "reasoning", "tool_calls")):
            outcome.arrivals.append(time.perf_counter() - outcome.due)
        outcome.finished = outcome.finished or choice.get("finish_reason") is not None


async def _beat(lags: list[float]) -> None:
    """How late this program's own tasks are woken."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(BEAT)
        lags.append(time.perf_counter() - before - BEAT)


def summary(outcomes: Sequence[Outcome], lags: Sequence[float], limit: float) -> dict[str, Any]:
    whole = [one for one in outcomes if one.problem is None]
    seconds = max(one.due + one.end for one in outcomes) - min(one.due for one in outcomes)
    firsts = [one.arrivals[0] for one in whole if one.arrivals]
    tokens = sum(one.tokens_out or len(one.arrivals) for one in whole)
    return {
        "requests": len(outcomes),
        "completed": len(whole),
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
    failed = figures["requests"] - figures["completed"] - sum(busy)

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


async def _first_model(client: httpx.AsyncClient, target: Target) -> str:
    try:
        response = await client.get(f"{target.base}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise RequestError(
            f"{target.base}/models: {error!s:.200}; expected a server with OpenAI's API there, or give --model"
        ) from None


async def _warm_up(client: httpx.AsyncClient, target: Target, bodies: Sequence[dict[str, Any]]) -> None:
    """The first answers are slow for other reasons than load; and a wrong address is known at once."""
    for body in bodies[:WARM_UP]:
        outcome = Outcome(time.perf_counter())
        await _ask(client, target, body, outcome)
        if outcome.problem is not None:
            answer = ""
            with suppress(httpx.HTTPError):
                answer = (await client.post(target.path, json=body | {"stream": False})).text
            raise RequestError(f"{target.path}: {outcome.problem}: {answer:.300}; expected a streamed answer")
