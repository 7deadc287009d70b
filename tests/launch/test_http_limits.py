"""What the HTTP server refuses and what it takes back: limits, keys, full queues, deadlines, readers that leave."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Serving, demo_runner, require_free, serving, until

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.http_settings import ServerSettings
from moe_nvfp4.runner import MoERunner

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def runner() -> Iterator[MoERunner]:
    with demo_runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def served(runner: MoERunner) -> Iterator[Serving]:
    settings: dict[str, Any] = {"max_body_bytes": 20_000, "body_seconds": 0.5, "stream_buffer": 8}
    with serving({"demo": runner}, **settings) as one:
        yield one


def long(**fields: Any) -> dict[str, Any]:
    """A request that takes some seconds."""
    return {"model": "demo", "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "temperature": 0, **fields}


def post(served: Serving, body: Any, path: str = COMPLETIONS, **options: Any) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=60, **options)


def raw(body: dict[str, Any]) -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and "Traceback" not in response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield "[DONE]" if line == "data: [DONE]" else json.loads(line[6:])


def test_keys(runner: MoERunner) -> None:
    with serving({"demo": runner}, api_keys=("first", "second")) as served:
        url = f"{served.url}/v1/models"
        for value in (None, "Bearer third", "Bearer", "Basic first", "first", "Bearer first2", "Bearer f\u00e9"):
            headers = {} if value is None else {"Authorization": value.encode()}
            response = httpx.get(url, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert "first" not in response.text
        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key) as client:
                assert client.models.list().data[0].id == "demo"
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert httpx.get(f"{served.url}/metrics").status_code == 200


@pytest.mark.parametrize("key", ["", "two words", "t\u00fcr", "a\nb"])
def test_keys_that_no_client_could_send(key: str) -> None:
    with pytest.raises(RequestError, match="api keys"):
        ServerSettings(api_keys=(key,))


def test_settings_are_positive() -> None:
    with pytest.raises(RequestError, match=r"ServerSettings\.drain_seconds: got 0"):
        ServerSettings(drain_seconds=0)


def test_a_body_that_is_too_large(served: Serving) -> None:
    large = json.dumps(long(prompt="x" * 30_000)).encode()
    assert error_of(post(served, long(prompt="x" * 30_000)), 413)["code"] == "body_too_large"
    pieces = (large[at : at + 5000] for at in range(0, len(large), 5000))  # without a Content-Length
    response = httpx.post(served.url + COMPLETIONS, content=pieces, headers={"Content-Type": "application/json"})
    assert error_of(response, 413)["code"] == "body_too_large"


@pytest.mark.parametrize("content", [b'{"model": "demo", "prompt": "x"}', b"[]"])
def test_a_body_that_is_no_json_object(served: Serving, content: bytes) -> None:
    kind = {"Content-Type": "application/json"} if content == b"[]" else {}
    response = httpx.post(served.url + COMPLETIONS, content=content, headers=kind)
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


def test_a_body_that_does_not_come(served: Serving) -> None:
    with socket.create_connection(served.listener.getsockname()) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        connection.settimeout(10)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/unknown", b"", 404),
        ("GET", "/v1/completions", b"", 405),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[" * 10_000, 400),
        ("POST", "/v1/completions", b"1" * 10_000, 400),
        ("POST", "/v1/completions", b'{"model": "demo", "prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b'{"model": "\\ud800", "prompt": "x"}', 400),
        ("POST", "/v1/completions", b'{"model": "demo", "prompt": "x", "temperature": NaN}', 400),
        ("POST", "/v1/completions", b'{"model": "demo", "prompt": [1, "x"]}', 400),
        ("POST", "/v1/completions", b'{"model": "demo", "prompt": [[]]}', 400),
        ("POST", "/v1/completions", b'{"model": "demo", "prompt": ""}', 400),
    ],
)
def test_nonsense(served: Serving, method: str, path: str, content: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(httpx.request(method, served.url + path, content=content, headers=headers), status)


def test_too_many_prompts(served: Serving) -> None:
    assert error_of(post(served, {"model": "demo", "prompt": ["x"] * 129}), 400)["param"] == "prompt"


def test_request_ids(served: Serving) -> None:
    given = httpx.get(f"{served.url}/health", headers={"X-Request-Id": "mine-1.a"})
    assert given.headers["x-request-id"] == "mine-1.a"
    for bad in ("a b", "x" * 65, "a;b"):
        own = httpx.get(f"{served.url}/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert re.fullmatch("req-[0-9a-f]{24}", own)


def test_log_lines_have_no_text(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="moe_nvfp4.http"):
        post(served, long(prompt="secretword", max_tokens=2), headers={"X-Request-Id": "logged"})
        until(lambda: any("logged" in record.getMessage() for record in caplog.records))
    (line,) = (record.getMessage() for record in caplog.records if "logged" in record.getMessage())
    fields = json.loads(line)
    assert fields["model"] == "demo" and fields["outcome"] == "ok" and fields["new_tokens"] == 2
    assert "secretword" not in caplog.text


def test_a_full_queue(served: Serving) -> None:
    """One place and one that waits; the third is refused, and a client that retries gets its answer."""
    with demo_runner(max_batch_size=1, max_waiting=1) as small, serving({"demo": small}) as tight:
        streams = [httpx.stream("POST", tight.url + COMPLETIONS, json=long(stream=True)) for _ in range(2)]
        opened = [stream.__enter__() for stream in streams]
        assert [response.status_code for response in opened] == [200, 200]
        for stream_too in (False, True):
            response = post(tight, long(stream=stream_too))
            assert error_of(response, 429)["code"] == "queue_full"
            assert 1 <= int(response.headers["retry-after"]) <= 60

        def leave() -> None:
            until(lambda: tight.value("moe_nvfp4_requests_total", outcome="rejected") >= 3)
            for stream in streams:
                stream.__exit__(None, None, None)

        leaving = threading.Thread(target=leave)
        leaving.start()
        with openai.OpenAI(base_url=f"{tight.url}/v1", api_key="any", max_retries=5) as client:
            assert client.completions.create(model="demo", prompt="x", max_tokens=3).choices[0].text
        leaving.join(10)


def test_the_deadline(runner: MoERunner) -> None:
    with serving({"demo": runner}, request_seconds=0.2) as served:
        assert error_of(post(served, long()), 504)["code"] == "deadline_exceeded"
        with httpx.stream("POST", served.url + COMPLETIONS, json=long(stream=True)) as response:
            found = list(events(response))
        assert found[-1]["error"]["code"] == "deadline_exceeded", "and no [DONE]"
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        with client, pytest.raises(openai.APIError, match="deadline"):
            list(client.completions.create(model="demo", prompt="x", max_tokens=1000, stream=True, temperature=0))
        until(lambda: served.value("moe_nvfp4_requests_total", outcome="timeout") == 3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(served: Serving, runner: MoERunner, stream: bool) -> None:
    before = served.value("moe_nvfp4_requests_total", outcome="cancelled")
    with socket.create_connection(served.listener.getsockname()) as connection:
        body = json.dumps(long(stream=stream, n=4)).encode()
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert connection.recv(100)
        until(lambda: runner.engine.free_slots == 4)
    began = time.monotonic()
    until(lambda: runner.engine.free_slots == 8)
    assert time.monotonic() - began < 2, "the pages came back at once"
    until(lambda: served.value("moe_nvfp4_requests_total", outcome="cancelled") == before + 1)
    require_free(runner)


def test_a_reader_that_stops(served: Serving, runner: MoERunner) -> None:
    """The engine goes on for others; the one that does not read is cancelled when its buffer is full."""
    served.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(served.listener.getsockname())
        body = json.dumps(long(stream=True, logprobs=20)).encode()
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: served.value("moe_nvfp4_requests_total", outcome="slow_reader") == 1, 30)
        require_free(runner)
        assert post(served, long(max_tokens=3)).status_code == 200
        connection.settimeout(10)
        received = b""
        while part := connection.recv(65536):
            received += part
        assert b"data: " in received and b"[DONE]" not in received


def test_a_stream_that_waits_says_so(served: Serving) -> None:
    with demo_runner(max_batch_size=1) as small, serving({"demo": small}, keep_alive=0.05) as slow:
        request = ("POST", slow.url + COMPLETIONS)
        with httpx.stream(*request, json=long(stream=True)), httpx.stream(*request, json=long(stream=True)) as second:
            lines = second.iter_lines()
            assert [next(lines) for _ in range(4)] == [": waiting", ""] * 2


def test_ready_and_metrics(runner: MoERunner) -> None:
    with serving({"demo": runner}, ready_interval=0.3) as served:
        for _ in range(2):
            assert httpx.get(f"{served.url}/ready").json() == {"status": "ready", "models": {"demo": True}}
        post(served, long(max_tokens=5, n=2))
        text = httpx.get(f"{served.url}/metrics").text
        assert 'moe_nvfp4_generated_tokens_total{model="demo"} 10' in text
        assert 'moe_nvfp4_time_to_first_token_seconds_count{model="demo"} 2' in text
        assert 'moe_nvfp4_time_between_tokens_seconds_count{model="demo"} 8' in text
        assert served.value("moe_nvfp4_pages_free", model="demo") > 0
        assert served.value("moe_nvfp4_requests_running", model="demo") == 0
        assert served.value("moe_nvfp4_places_free", model="demo") == 8
        assert served.value("moe_nvfp4_decode_steps_total", model="demo") >= 4


def test_an_engine_that_is_gone() -> None:
    with demo_runner() as lost, serving({"other": lost}, ready_interval=0.01) as served:
        lost.close()
        time.sleep(0.02)
        assert httpx.get(f"{served.url}/ready").status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 200
        for stream in (True, False):
            error = error_of(post(served, {"model": "other", "prompt": "x", "stream": stream}), 503)
            assert error["code"] == "engine_unavailable" and "closed" not in error["message"]


def drained(served: Serving) -> Any:
    """Begins a drain in the server's own loop."""
    return asyncio.run_coroutine_threadsafe(served.server.drain(), served.loop)


def test_a_drain_lets_running_answers_finish(runner: MoERunner) -> None:
    with serving({"demo": runner}, drain_seconds=30) as served:
        with httpx.stream("POST", served.url + COMPLETIONS, json=long(stream=True, max_tokens=100)) as response:
            lines = events(response)
            next(lines)
            drain = drained(served)
            until(lambda: served.server.draining)
            refused = post(served, long())
            assert error_of(refused, 503)["code"] == "shutting_down" and int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{served.url}/ready").status_code == 503
            assert httpx.get(f"{served.url}/health").status_code == 200
            assert list(lines)[-1] == "[DONE]"
        drain.result(5)


def test_a_drain_ends_what_takes_too_long(runner: MoERunner) -> None:
    with serving({"demo": runner}, drain_seconds=0.2) as served:
        whole: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: whole.append(post(served, long())))
        waiting.start()
        with httpx.stream("POST", served.url + COMPLETIONS, json=long(stream=True)) as response:
            lines = events(response)
            next(lines)
            until(lambda: len(served.server.relays) == 2)
            drained(served).result(5)
            assert list(lines)[-1]["error"]["code"] == "shutting_down"
        waiting.join(10)
        assert error_of(whole[0], 503)["code"] == "shutting_down"
