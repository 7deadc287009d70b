"""Hundreds of streams at once, a third of which are cancelled at random: every answer that ends is the offline one, and
nothing is left behind. MOE_NVFP4_SOAK_SECONDS=120 goes on for as long."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from serving import Serving, demo_runner, require_free, serving, until

from moe_nvfp4.sampling import SamplingParams

STREAMS, KINDS = 500, 40
SECONDS = float(os.environ.get("MOE_NVFP4_SOAK_SECONDS", "0"))
GROWTH = 48 << 20  # bytes of memory that more rounds may take: allocators round up

Kind = tuple[list[int], dict[str, Any], str]  # prompt, sampling, the offline answer


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with demo_runner(max_batch_size=64, max_seq_len=256) as runner, serving({"demo": runner}) as one:
        yield one


def kinds(served: Serving) -> list[Kind]:
    draw = random.Random(5)
    prompts = [[draw.randrange(1000) for _ in range(draw.choice((3, 20, 90)))] for _ in range(KINDS)]
    asked = [{"temperature": draw.choice((0.0, 0.9)), "seed": draw.randrange(99)} for _ in prompts]
    lengths = [draw.randint(3, 14) for _ in prompts]
    params = [SamplingParams(**one, max_new_tokens=n, ignore_eos=True) for one, n in zip(asked, lengths, strict=True)]
    answers = served.runners["demo"].generate(prompts, params)
    fields = [{**one, "max_tokens": n, "ignore_eos": True} for one, n in zip(asked, lengths, strict=True)]
    return [(prompt, one, answer.text) for prompt, one, answer in zip(prompts, fields, answers, strict=True)]


async def one_stream(client: httpx.AsyncClient, kind: Kind, patience: int | None, draw: random.Random) -> str:
    """Reads it to its end, or `patience` lines of it."""
    prompt, fields, expected = kind
    body = {"model": "demo", "prompt": prompt, "stream": True, **fields}
    if patience == 0:  # gone before the answer begins
        asked = client.post("/v1/completions", json={**body, "stream": False})
        try:
            response = await asyncio.wait_for(asked, draw.random() / 20)
        except TimeoutError:
            return "cancelled"
        assert response.json()["choices"][0]["text"] == expected
        return "finished"
    text, lines = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            lines += line.startswith("data: ")
            if lines == patience:
                return "cancelled"
            if line == "data: [DONE]":
                assert text == expected
                return "finished"
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
    raise AssertionError("a stream ended without [DONE]")


async def a_round(url: str, found: list[Kind], seed: int) -> Counter[str]:
    draw, limits = random.Random(seed), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
        streams = [
            one_stream(client, draw.choice(found), draw.choice((0, 1, 3)) if index % 3 == 0 else None, draw)
            for index in range(STREAMS)
        ]
        return Counter(await asyncio.gather(*streams))


def held(served: Serving) -> set[str]:
    """Every open file, socket and task."""
    numbers = os.listdir("/proc/self/fd")
    files = {os.readlink(f"/proc/self/fd/{n}") for n in numbers if os.path.islink(f"/proc/self/fd/{n}")}
    return files | {f"{task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks(served.loop)}


def until_nothing_but(before: set[str], served: Serving) -> None:
    """Less than before is well: tests that ran earlier in this process may have left what is collected now."""
    try:
        until(lambda: not served.server.relays and held(served) <= before, 30)
    except AssertionError:
        raise AssertionError(f"left behind: {served.server.relays or ''} {sorted(held(served) - before)}") from None


def test_streams_that_end_and_streams_that_are_cancelled(served: Serving) -> None:
    found, process = kinds(served), psutil.Process()
    before, memory, began, rounds = held(served), 0, time.monotonic(), 0
    while rounds == 0 or time.monotonic() - began < SECONDS:
        counts = asyncio.run(a_round(served.url, found, rounds))
        assert counts["finished"] >= STREAMS * 0.6 and counts["cancelled"] >= STREAMS * 0.2, counts
        require_free(served.runners["demo"], 30)
        until_nothing_but(before, served)
        rounds += 1
        memory = memory or process.memory_info().rss
    grown = process.memory_info().rss - memory
    assert grown < GROWTH, f"{grown / 2**20:.0f} MiB more after {rounds} rounds"
