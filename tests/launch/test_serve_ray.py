"""The server on Ray Serve: a Ray of its own, two replicas of the demo model on the CPU, and clients from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("ray.serve", reason="needs the extra ray")
openai = pytest.importorskip("openai", reason="needs openai")

import moe_nvfp4  # noqa: E402
from moe_nvfp4 import MoERunner, SamplingParams  # noqa: E402
from moe_nvfp4.launch.serve_app import merged  # noqa: E402

DEMO = Path(moe_nvfp4.__file__).parent / "demo"
SLOTS, WAITING, LENGTH = 4, 6, 512  # of each of the two replicas
TOKENS = 120
PROMPTS = 8
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # of 15, workers get hardly any time beside other tests
    # Seconds, of which 5 and 10 are usual: Serve takes a proxy that starts beside other tests for one that is broken.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


@dataclass
class Served:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def replicas(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in found if "ServeReplica" in "".join(child.cmdline()[:1])]

    def value(self, name: str) -> dict[str, float]:
        """Of a metric, by replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=20).text
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        return {line.split('replica="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("ray") / "serve.log"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "moe_nvfp4.launch.serve", "--model", str(DEMO), "--served-model-name", "demo"]
    command += ["--device", "cpu", "--port", str(port), "--replicas", "2", "--max-seq-len", str(LENGTH)]
    command += ["--max-batch-size", str(SLOTS), "--max-waiting", str(WAITING), "--drain-seconds", "20"]
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)
    one = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        until(lambda: "serving demo" in log.read_text() or process.poll() is not None, 240)
        assert process.poll() is None, log.read_text()[-3000:]
        yield one
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def prompt(number: int) -> str:
    return f"Story {number}: once upon a time"


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Answers to the first prompts, without a server."""
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    with MoERunner.from_pretrained(DEMO, device="cpu", max_batch_size=SLOTS, max_seq_len=LENGTH, verbose=False) as one:
        return [answer.text for answer in one.generate([prompt(number) for number in range(PROMPTS)], params)]


def read(url: str, number: int, begun: threading.Event | None = None) -> str | None:
    """The whole answer; None where the client can tell that it did not get it."""
    body = {"model": "demo", "prompt": prompt(number), "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    text, finished, done = "", False, False
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
            if response.status_code != 200:
                assert response.status_code in (429, 500, 503)  # what the openai client tries again
                return None
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                data = json.loads(line[6:])
                if "error" in data:
                    return None
                text += data["choices"][0]["text"]
                finished = finished or data["choices"][0]["finish_reason"] is not None
                if begun is not None and text:
                    begun.set()
    except httpx.TransportError:
        return None
    return text if finished and done else None


def test_metrics_of_several_processes_are_one_text() -> None:
    one = '# HELP a_total Of a.\n# TYPE a_total counter\na_total{model="m"} 1\n# HELP b Of b.\n# TYPE b gauge\nb 2\n'
    two = "# HELP b Of b.\n# TYPE b gauge\nb 3\n# HELP c Of c.\n# TYPE c gauge\n"
    assert merged([("y", two), ("x", one)]).splitlines() == [
        "# HELP a_total Of a.",
        "# TYPE a_total counter",
        'a_total{replica="x",model="m"} 1',
        "# HELP b Of b.",
        "# TYPE b gauge",
        'b{replica="x"} 2',
        'b{replica="y"} 3',
        "# HELP c Of c.",
        "# TYPE c gauge",
    ]


def test_the_openai_client(served: Served, expected: list[str]) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["demo"]
    fields = {"model": "demo", "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(prompt=prompt(0), **fields)
    assert whole.choices[0].text == expected[0] and whole.usage.completion_tokens == TOKENS
    messages = [{"role": "user", "content": "Tell me a story"}]
    answer = client.chat.completions.create(messages=messages, **fields).choices[0]
    stream = client.chat.completions.create(messages=messages, stream=True, **fields)
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(deltas) == answer.message.content and len(deltas) > TOKENS // 4
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert "text/html" in httpx.get(served.url).headers["content-type"]
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready", "models": {"demo": True}}


def test_who_leaves_frees_what_he_held(served: Served) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": LENGTH - 50, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as response:
        assert any(line.startswith("data: ") for line in response.iter_lines())
    until(lambda: set(served.value("moe_nvfp4_pages_held").values()) == {0}, 10)
    text = httpx.get(f"{served.url}/metrics").text
    assert 'outcome="cancelled"' in text


def test_more_than_fits_is_refused_and_the_rest_answered(served: Served, expected: list[str]) -> None:
    crowd = 3 * (SLOTS + WAITING)
    with ThreadPoolExecutor(crowd) as pool:
        answers = list(pool.map(lambda number: read(served.url, number % PROMPTS), range(crowd)))
    whole = [(number % PROMPTS, answer) for number, answer in enumerate(answers) if answer is not None]
    assert SLOTS + WAITING <= len(whole) < crowd
    assert all(answer == expected[number] for number, answer in whole)
    assert 'outcome="rejected"' in httpx.get(f"{served.url}/metrics").text


def test_a_killed_replica_under_load(served: Served, expected: list[str]) -> None:
    """Whole answers are right, and broken ones are known as such; another replica comes, and all is answered."""
    victim, other = served.replicas()
    begun = [threading.Event() for _ in range(PROMPTS)]  # its first token has come
    with ThreadPoolExecutor(PROMPTS) as pool:
        futures = [pool.submit(read, served.url, number, event) for number, event in enumerate(begun)]
        assert begun[0].wait(30)
        victim.kill()
        answers = {number: future.result() for number, future in enumerate(futures)}
        assert None in answers.values() and any(answers.values())  # both replicas had some of them
        for _ in range(60):
            if not (broken := [number for number, answer in answers.items() if answer is None]):
                break
            answers |= dict(zip(broken, pool.map(lambda number: read(served.url, number), broken), strict=True))
            time.sleep(0.5)
    assert list(answers.values()) == expected
    assert other.is_running()
    until(lambda: len(served.value("moe_nvfp4_pages_held")) == 2, 60)


def test_drain(served: Served, expected: list[str]) -> None:
    """The last test of this file: after SIGTERM what runs is finished, and the command ends."""
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(read, served.url, 3, begun)
        assert begun.wait(20)
        served.process.send_signal(signal.SIGTERM)
        assert future.result() == expected[3]
    assert served.process.wait(60) == 0
    until(lambda: not psutil.pid_exists(served.process.pid), 5)
