"""`bench serve` against servers whose times are known."""

import asyncio
import json
import socket
import statistics
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, Response, StreamingResponse  # noqa: E402

from moe_nvfp4.errors import RequestError  # noqa: E402
from moe_nvfp4.launch import bench_serve as bench  # noqa: E402
from moe_nvfp4.launch.cli import main  # noqa: E402
from moe_nvfp4.launch.load_client import Outcome, Target, beat  # noqa: E402
from moe_nvfp4.launch.serve_load import MEANS, MOST, Load  # noqa: E402

FIRST, BETWEEN = 0.1, 0.02  # seconds


class Timed:
    """Answers after `first` seconds, then every BETWEEN. `room` at once, others wait, more than `queue` get a 429."""

    def __init__(self) -> None:
        self.room, self.queue, self.first = 10_000, 10_000, FIRST
        self.inside = self.served = 0
        self.bodies: list[dict[str, Any]] = []
        self.breaks: dict[int, str] = {}  # by the number of the request: how its answer goes wrong

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": [{"id": "timed"}]}

        @app.post("/v1/{kind:path}")
        async def complete(kind: str, request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            if self.inside >= self.room + self.queue:
                return JSONResponse({"error": {"message": "full"}}, status_code=429)
            self.inside += 1
            return StreamingResponse(
                self.answer(body, self.breaks.get(len(self.bodies))), media_type="text/event-stream"
            )

        return app

    async def answer(self, body: dict[str, Any], breaks: str | None) -> AsyncIterator[str]:
        while self.served >= self.room:
            await asyncio.sleep(0.002)
        self.served += 1
        try:
            await asyncio.sleep(self.first)
            for number in range(body["max_tokens"]):
                if number:
                    await asyncio.sleep(BETWEEN)
                if breaks == "cut off" and number == 1:
                    return
                if breaks == "hang":
                    await asyncio.sleep(30)
                if breaks == "error" and number == 1:
                    yield 'data: {"error": {"message": "broken"}}\n\n'
                    return
                text = {"text": "a "} if "prompt" in body else {"delta": {"content": "a "}}
                # Data need not come in whole lines.
                line = f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None} | text]})}\n\n"
                yield line[:20]
                yield line[20:]
        finally:
            self.inside -= 1
            self.served -= 1
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        yield f"data: {json.dumps({'choices': [{'index': 0, 'text': '', 'finish_reason': 'length'}]})}\n\n"
        yield f": a comment\n\ndata: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


@pytest.fixture
def timed() -> Iterator[tuple[str, Timed]]:
    server_of, listener = Timed(), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(server_of.app(), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", server_of
    server.should_exit = True
    thread.join(10)


def few(requests: int, answer: int = 5) -> Load:
    return Load(requests, "log-uniform", prompt=(3, 9), answer=(answer, answer))


def run(url: str, load: Load, rates: list[float], limit: float = 1.0, search: bool = False, **target: Any) -> Any:
    lines: list[str] = []
    processes = target.pop("processes", 1)
    served = bench.bench_serve(
        Target(url, **target), load, rates, lines.append, limit=limit, search=search, processes=processes
    )
    figures = asyncio.run(served)
    return figures, "\n".join(lines)


def test_lengths_and_arrivals_are_what_they_are_called() -> None:
    load = Load(20_000)
    lengths = load._lengths()
    for column, mean in zip(zip(*lengths, strict=True), MEANS, strict=True):
        assert max(column) <= MOST
        assert 0.8 * mean < statistics.mean(column) < mean  # less, because of the bound
    arrivals = load.arrivals(4.0)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)  # of a Poisson process both are the same
    bodies, others = load.bodies("m", False, 1.0), load.bodies("m", False, 2.0)
    assert bodies[0]["prompt"] != others[0]["prompt"]
    assert len(bodies[0]["prompt"].split()) == len(others[0]["prompt"].split()) == lengths[0][0]
    ids = Load(50, vocab=11).bodies("m", False, 1.0)
    assert {token for body in ids for token in body["prompt"]} == set(range(11))


@pytest.mark.parametrize(("chat", "processes"), [(False, 1), (True, 2)])
def test_times_are_those_of_the_server(timed: tuple[str, Timed], chat: bool, processes: int) -> None:
    url, server = timed
    figures, table = run(url, few(30), [30.0], chat=chat, key="secret", processes=processes)
    (one,) = figures["rates"]
    assert figures["model"] == "timed" and figures["largest_rate"] is None
    assert (one["completed"], one["tokens_in"], one["tokens_out"], one["problems"]) == (30, 210, 150, {})
    assert FIRST <= one["first_token"]["p50"] < FIRST + 0.15
    assert BETWEEN <= one["between_tokens"]["p50"] < BETWEEN + 0.05
    assert FIRST + 4 * BETWEEN <= one["end_to_end"]["p50"] < FIRST + 4 * BETWEEN + 0.5
    assert one["seconds"] >= few(30).arrivals(30.0)[-1] - few(30).arrivals(30.0)[0]
    assert "messages" in server.bodies[0] if chat else "prompt" in server.bodies[0]
    assert f"{30:>6} | {30:>5} |   0   0 |" in table


def test_the_loop_is_open(timed: tuple[str, Timed]) -> None:
    """Requests come when they are due, though the first still wait; and waiting counts."""
    url, server = timed
    server.room = 1
    figures, _ = run(url, few(12, answer=2), [100.0])
    first = figures["rates"][0]["first_token"]
    assert first["max"] > 10 * FIRST  # behind eleven others
    assert figures["rates"][0]["within_limit_per_second"] < figures["rates"][0]["requests_per_second"]


def test_what_goes_wrong_is_counted_by_its_kind(timed: tuple[str, Timed]) -> None:
    url, server = timed
    server.breaks = {3: "cut off", 5: "error"}  # the first warms it up
    figures, table = run(url, few(8), [50.0])
    one = figures["rates"][0]
    assert one["problems"] == {"cut off": 1, "error in the stream": 1}
    assert one["completed"] == 6 and one["tokens_out"] == 30
    assert "cut off 1" in table
    server.room, server.queue, server.breaks = 2, 1, {}
    server.first = 1.0  # so that none of the three ends before the last has come
    figures, _ = run(url, few(20), [500.0])
    assert figures["rates"][0]["problems"] == {"429": 17}
    server.first = FIRST
    server.breaks = {len(server.bodies) + 2: "hang"}
    figures, _ = run(url, few(2), [100.0], timeout=1.5)
    assert figures["rates"][0]["problems"] == {"timeout": 1}


def test_clients_leave(timed: tuple[str, Timed]) -> None:
    url, server = timed
    load = Load(40, "log-uniform", prompt=(3, 9), answer=(30, 30), leaving=0.5)
    stay = load.patience(40.0).count(None)
    assert 5 < stay < 35
    figures, table = run(url, load, [40.0])
    one = figures["rates"][0]
    assert (one["completed"], one["left"], one["problems"]) == (stay, 40 - stay, {})
    assert one["tokens_out"] == 30 * stay
    assert f"{40 - stay} clients left" in table and one["taken"] == {}
    assert server.inside == 0


def test_the_largest_rate_within_a_limit(timed: tuple[str, Timed]) -> None:
    """Two at a time, FIRST + BETWEEN seconds each: 16 requests a second at most, fewer with a limit on waiting."""
    url, server = timed
    server.room = 2
    figures, table = run(url, few(16, answer=2), [8.0], limit=4 * FIRST, search=True)
    assert 4 <= figures["largest_rate"] <= 30
    rates = [one["rate"] for one in figures["rates"]]
    assert rates == sorted(rates) and len(rates) > 2
    for one in figures["rates"]:
        assert (one["first_token"]["p99"] <= 4 * FIRST) == (one["rate"] <= figures["largest_rate"])
    assert "largest rate" in table
    hopeless, _ = run(url, few(1, answer=1), [50.0], limit=FIRST / 2, search=False)
    assert hopeless["largest_rate"] is None


def test_it_says_when_it_was_late_itself() -> None:
    async def busy() -> list[float]:
        lags: list[float] = []
        heart = asyncio.create_task(beat(lags))
        for _ in range(5):
            await asyncio.sleep(0.02)
            time.sleep(0.1)
        heart.cancel()
        return lags

    outcome = Outcome(0.0, [0.1, 0.2], 0.3, 1, 2, True)
    figures = bench.summary([outcome], asyncio.run(busy()), 1.0)
    assert figures["late"] and figures["own_lag"]["max"] > 0.05
    assert "late at p99" in bench.row(1.0, figures)
    assert not bench.summary([outcome], [0.001] * 100, 1.0)["late"]


def test_command(timed: tuple[str, Timed], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, server = timed
    files = tmp_path / "figures.json", tmp_path / "figures.svg"
    options = ["--lengths", "log-uniform", "--prompt", "2,3", "--answer", "2,4", "--requests", "5", "--vocab", "9"]
    options += ["--rates", "20,40", "--json", str(files[0]), "--plot", str(files[1])]
    assert main(["bench", "serve", "--url", url + "/v1/", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "this program was" not in line]  # late, if it was
    assert len(lines) == 4
    assert all(max(body["prompt"]) < 9 for body in server.bodies)
    assert [one["rate"] for one in json.loads(files[0].read_text())["rates"]] == [20, 40]
    lines = ElementTree.parse(files[1]).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 7 and all(len(line.attrib["points"].split()) == 2 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "0"], "--rates"),
        (["--rates", "inf"], "--rates"),
        (["--requests", "0"], "--requests"),
        (["--lengths", "log-uniform", "--prompt", "9,3"], "--prompt"),
        (["--vocab", "0"], "--vocab"),
        (["--leaving", "1.5"], "--leaving"),
        (["--processes", "0"], "--processes"),
        (["--vocab", "9", "--chat"], "--chat"),
        (["--url", "http://127.0.0.1:9"], "127.0.0.1:9/v1/models"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_know_a_field_is_named(timed: tuple[str, Timed]) -> None:
    url, server = timed
    server.queue = -10_000
    with pytest.raises(RequestError, match=r"completions: 429: .*full"):
        run(url, few(2), [1.0])
