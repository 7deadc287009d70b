"""What the engine is told between two steps, as plain data, and where it comes from.

The scheduler is deterministic, so ranks that carry out the same orders at the same turns stay in step without a word
about tokens. What depends on the clock or on chance (deadlines, seeds, how long to wait) is decided once, by the rank
that clients talk to, and is part of its orders.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Protocol

from moe_nvfp4.engine.order_link import Line, Lines
from moe_nvfp4.generation import Answer, Increment
from moe_nvfp4.sampling import SamplingParams

# Takes what an answer got. May return a function that wakes who waits, to be called when others have got theirs too.
Sink = Callable[[Increment | Exception], Callable[[], None] | None]
# Builds an answer from the prompt, the tokens that it has already, the parameters, and its number among n.
Build = Callable[[list[int], list[int], SamplingParams, int], Answer]
BEAT_SECONDS: Final = 0.5  # a leader with nothing to do takes a turn so often, to show that it lives


def nobody(_: Increment | Exception) -> None:
    """The sink of an answer whose client is at another rank."""


def hand_out(items: Iterable[tuple[Sink, Increment | Exception]]) -> None:
    """To all sinks; then each who waits is woken, once."""
    for wake in {wake for sink, item in items if (wake := sink(item)) is not None}:
        wake()


@dataclass(frozen=True, slots=True)
class Submit:
    answer: Answer
    sink: Sink = nobody
    encoded: bytes | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    ident: int


@dataclass(frozen=True, slots=True)
class Late:
    """Their deadlines have passed."""

    idents: list[int]


@dataclass(frozen=True, slots=True)
class Call:
    """Runs a function between steps, with nothing in flight. One with a name runs at every rank, under that name and
    with arguments that JSON can hold; one without runs here, and the others only land what is in flight as well."""

    name: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    function: Callable[[], Any] | None = None
    done: queue.SimpleQueue[tuple[bool, Any]] = field(default_factory=queue.SimpleQueue)


@dataclass(frozen=True, slots=True)
class Close:
    pass


Order = Submit | Cancel | Late | Call | Close


class Orders(Protocol):
    """Where an engine's orders come from."""

    decides: bool  # whether this rank decides what depends on the clock

    def put(self, order: Order) -> None:
        """From any thread."""

    def take(self, wait: bool) -> list[Order]:
        """Those of the next turn. `wait`: there is nothing to do without one."""

    def share(self, orders: list[Order], digest: int) -> None:
        """Tells the other ranks. `digest`: of all tokens so far, which must be the same everywhere."""

    def close(self) -> None: ...

    def rest(self) -> list[Order]:
        """What has come and was not taken."""


class LocalOrders:
    """Of an engine that is alone."""

    decides = True

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def put(self, order: Order) -> None:
        self._queue.put(order)

    def take(self, wait: bool) -> list[Order]:
        return self._drain([self._queue.get()] if wait else [])

    def share(self, orders: list[Order], digest: int) -> None: ...

    def close(self) -> None: ...

    def rest(self) -> list[Order]:
        return self._drain([])

    def _drain(self, orders: list[Order]) -> list[Order]:
        with suppress(queue.Empty):
            while True:
                orders.append(self._queue.get_nowait())
        return orders


class LeaderOrders(LocalOrders):
    """Of the rank that clients talk to."""

    def __init__(self, lines: Lines):
        super().__init__()
        self._lines = lines

    def put(self, order: Order) -> None:
        if isinstance(order, Submit):  # a long prompt is encoded in the client's thread, not between two steps
            order = replace(order, encoded=encode(order))
        super().put(order)

    def take(self, wait: bool) -> list[Order]:
        first: list[Order] = []
        if wait:
            with suppress(queue.Empty):
                first.append(self._queue.get(timeout=BEAT_SECONDS))
        return self._drain(first)

    def share(self, orders: list[Order], digest: int) -> None:
        self._lines.send(digest.to_bytes(4, "little") + b",".join(map(encode, orders)))

    def close(self) -> None:
        self._lines.close()


class Diverged(RuntimeError):
    """Ranks that should compute the same do not."""


class FollowerOrders:
    """Of the other ranks. Nobody may give orders here."""

    decides = False

    def __init__(self, line: Line, build: Build):
        self._line, self._build, self._told = line, build, 0
        self._closed = threading.Event()

    def put(self, order: Order) -> None:
        if not isinstance(order, Close):
            raise RuntimeError("this rank follows another one; requests go to rank 0")
        self._closed.set()
        self._line.close()

    def take(self, wait: bool) -> list[Order]:
        try:
            message = self._line.receive()
        except OSError:
            if self._closed.is_set():
                return [Close()]
            raise
        self._told = int.from_bytes(message[:4], "little")
        return [decode(data, self._build) for data in json.loads(b"[" + message[4:] + b"]")]

    def share(self, orders: list[Order], digest: int) -> None:
        if digest != self._told:
            raise Diverged(
                "this rank has sampled other tokens than rank 0, so their results cannot be trusted. Check that all "
                "ranks run the same versions on GPUs of one kind."
            )

    def close(self) -> None:
        self._line.close()

    def rest(self) -> list[Order]:
        return []


def encode(order: Order) -> bytes:
    data: dict[str, Any]
    match order:
        case Submit(encoded=bytes(encoded)):
            return encoded
        case Submit(answer):
            tokens, length = answer.sequence.tokens, answer.sequence.prompt_length
            data = {"ident": answer.sequence.ident, "prompt": tokens[:length], "answered": tokens[length:]}
            data |= {"choice": answer.choice, "params": asdict(answer.params)}
        case Call(name, arguments):
            data = {"name": name, "arguments": arguments}
        case _:
            data = asdict(order)
    return json.dumps({"order": type(order).__name__, **data}, separators=(",", ":")).encode()


def decode(data: dict[str, Any], build: Build) -> Order:
    match data.pop("order"):
        case "Submit":
            answer = build(data["prompt"], data["answered"], SamplingParams(**data["params"]), data["choice"])
            answer.sequence.ident = data["ident"]
            return Submit(answer)
        case "Cancel":
            return Cancel(**data)
        case "Late":
            return Late(**data)
        case "Call":
            return Call(**data)
        case "Close":
            return Close()
        case other:
            raise ValueError(f"order {other!r:.40}: this rank runs another version than rank 0")
