"""A process of `bench serve`: sends requests when they are due, and notes when pieces of the answers come.

Jobs come as lines of JSON on standard input, and outcomes go to standard output. Times are those of the monotonic
clock, which all processes of a machine share.
"""

import asyncio
import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

BEAT = 0.01  # seconds between two looks at the clock
SAID = "content", "text", "reasoning_content", "reasoning", "tool_calls", "token_ids"  # what a piece of an answer has


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

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(slots=True)
class Outcome:
    """Of one request, in seconds from when it was due."""

    due: float
    arrivals: list[float] = field(default_factory=list)  # of pieces of text
    end: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    finished: bool = False
    left: bool = False  # this client did, before the answer was complete
    problem: str | None = None  # what kept it from being a whole answer
    detail: str = ""  # what the server said of it


async def send_all(
    target: Target, dues: list[float], bodies: list[dict[str, Any]], patience: list[int | None]
) -> tuple[list[Outcome], list[float]]:
    """The outcomes, and how late this process was: at sending, and at waking its tasks. `patience`: after how many
    pieces a client leaves."""
    lags: list[float] = []
    tasks: list[asyncio.Task[None]] = []
    outcomes = [Outcome(due) for due in dues]
    heart = asyncio.create_task(beat(lags))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
    async with httpx.AsyncClient(limits=limits, headers=target.headers, timeout=target.timeout) as client:
        try:
            for outcome, body, most in zip(outcomes, bodies, patience, strict=True):
                await asyncio.sleep(max(0.0, outcome.due - time.monotonic()))
                lags.append(time.monotonic() - outcome.due)
                tasks.append(asyncio.create_task(_ask(client, target, body, outcome, most)))
            await asyncio.gather(*tasks)
        finally:
            for task in (heart, *tasks):
                task.cancel()
    return outcomes, lags


async def beat(lags: list[float]) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(BEAT)
        lags.append(time.monotonic() - before - BEAT)


async def _ask(
    client: httpx.AsyncClient, target: Target, body: dict[str, Any], outcome: Outcome, most: int | None
) -> None:
    try:
        async with asyncio.timeout(target.timeout), client.stream("POST", target.path, json=body) as response:
            if response.status_code != 200:
                outcome.problem = str(response.status_code)
                outcome.detail = (await response.aread()).decode(errors="replace")[:300]
                return
            rest = b""
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and b"[DONE]" not in line:
                        _take(json.loads(line[5:]), outcome)
                if most is not None and len(outcome.arrivals) >= most and not outcome.finished:
                    outcome.left = True
                    return
            if outcome.problem is None and not outcome.finished:
                outcome.problem = "cut off"
    except TimeoutError:
        outcome.problem = "timeout"
    except httpx.HTTPError as error:
        outcome.problem, outcome.detail = type(error).__name__, str(error)[:300]
    except ValueError:
        outcome.problem = "not JSON"
    finally:
        outcome.end = time.monotonic() - outcome.due


def _take(event: dict[str, Any], outcome: Outcome) -> None:
    if "error" in event:
        outcome.problem, outcome.detail = "error in the stream", json.dumps(event["error"])[:300]
    if usage := event.get("usage"):
        outcome.tokens_in, outcome.tokens_out = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or choice
        if any(delta.get(key) for key in SAID):
            outcome.arrivals.append(time.monotonic() - outcome.due)
        outcome.finished = outcome.finished or choice.get("finish_reason") is not None


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        outcomes, lags = asyncio.run(send_all(Target(**job["target"]), job["dues"], job["bodies"], job["patience"]))
        print(json.dumps({"outcomes": [asdict(one) for one in outcomes], "lags": lags}), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # who started this process tells of it
        main()
