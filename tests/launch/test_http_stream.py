"""Between engine and reader: what has come is read together, who waits is not slow, and who is slow is left."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from moe_nvfp4.async_runner import Receiver
from moe_nvfp4.generation import Increment
from moe_nvfp4.launch.http_stream import Relay


class Tap:
    """An engine's side of a relay, by hand."""

    def __init__(self) -> None:
        self.put: Receiver = lambda _: None
        self.is_closed = False

    def follow(self, receiver: Receiver) -> Any:
        self.put = receiver
        return self

    def cancel(self) -> None:
        self.is_closed = True


def increment(token_id: int) -> Increment:
    return Increment(0, 0, "x", (token_id,))


def run(scenario: Callable[[Tap, Relay], Coroutine[Any, Any, None]], most: int | None = 3) -> None:
    async def within() -> None:
        tap = Tap()
        relay = Relay(tap.follow, most)
        try:
            async with asyncio.timeout(10):
                await scenario(tap, relay)
        finally:
            relay.close()
        assert tap.is_closed

    asyncio.run(within())


def test_all_that_has_come_is_read_together() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        for token_id in range(3):
            tap.put(increment(token_id))
        tap.put(None)
        assert await relay.next() == [increment(0), increment(1), increment(2)]
        assert await relay.next() == [] == await relay.next()

    run(scenario)


def test_an_error_comes_after_what_came_before_it() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        tap.put(increment(0))
        tap.put(ValueError("broken"))
        assert await relay.next() == [increment(0)]
        with pytest.raises(ValueError, match="broken"):
            await relay.next()

    run(scenario)


def test_what_goes_wrong_at_once() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        def refuse(_: Receiver) -> Any:
            raise ValueError("full")

        with pytest.raises(ValueError, match="full"):
            await Relay(refuse, None).begun(10)
        await relay.begun(0.01)  # nothing has gone wrong, nor come
        tap.put(ValueError("late"))
        with pytest.raises(ValueError, match="late"):
            await relay.begun(10)

    run(scenario)


def test_patience_begins_anew_with_each_increment() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.15, tap.put, increment(0))
        assert await relay.next(0.2) == [increment(0)]
        for _ in range(2):
            began = loop.time()
            with pytest.raises(TimeoutError):
                await relay.next(0.2)
            assert loop.time() - began > 0.19

    run(scenario)


def test_each_wait_has_its_own_patience() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, tap.put, increment(0))
        await relay.begun(0.1)
        assert await relay.next(10) == [increment(0)]
        for number, patience in enumerate((10, None)):
            loop.call_later(0.2, tap.put, increment(number))
            assert await relay.next(patience) == [increment(number)]
        with pytest.raises(TimeoutError):
            await relay.next(0.01)

    run(scenario)


def test_a_reader_that_waits_is_not_slow() -> None:
    """However much comes before it has its turn."""

    async def scenario(tap: Tap, relay: Relay) -> None:
        reading = asyncio.create_task(relay.next())
        await asyncio.sleep(0)
        for token_id in range(10):
            tap.put(increment(token_id))
        assert len(await reading) == 10 and not relay.too_slow.is_set()

    run(scenario)


def test_a_reader_that_is_busy_for_too_long() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        for token_id in range(3):
            tap.put(increment(token_id))
        assert not relay.too_slow.is_set() and not tap.is_closed
        tap.put(increment(3))
        assert relay.too_slow.is_set() and tap.is_closed

    run(scenario)


def test_a_reader_gets_the_reason_for_an_end_at_once() -> None:
    async def scenario(tap: Tap, relay: Relay) -> None:
        tap.put(increment(0))
        relay.fail(ValueError("shut down"))
        assert tap.is_closed
        with pytest.raises(ValueError, match="shut down"):
            await relay.next()

    run(scenario)
