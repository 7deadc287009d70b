"""`moe-nvfp4 serve` as a process: it says where it listens, answers, drains on SIGTERM and ends with 0."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import DEMO, until

from moe_nvfp4.launch import cli

BODY = {"model": "demo", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}


@contextmanager
def process(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server, and its address."""
    command = [sys.executable, "-m", "moe_nvfp4.launch.cli", "serve", "--model", str(DEMO), "--port", "0"]
    command += ["--served-model-name", "demo", "--device", "cpu", "--max-seq-len", "4096", *options]
    found = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert found.stderr is not None
    try:
        for line in found.stderr:
            if address := re.match(r"listening on (http://127\.0\.0\.1:\d+) with demo", line):
                yield found, address[1]
                return
        raise AssertionError("it ended without listening")
    finally:
        found.kill()
        found.wait()


def test_drain_on_sigterm(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n\n")
    with process("--api-key-file", str(keys), MOE_NVFP4_API_KEYS="from-variable") as (server, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer from-variable"}
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, headers=headers, timeout=60) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            refused = httpx.post(f"{url}/v1/completions", json=BODY, headers={"Authorization": "Bearer from-file"})
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(20) == 0
        assert server.stderr is not None
        logged = server.stderr.read()
        line = next(json.loads(one) for one in logged.splitlines() if '"new_tokens": 300' in one)
        assert line["outcome"] == "ok" and "from-" not in logged and "Traceback" not in logged


def test_a_second_signal_ends_it_at_once() -> None:
    endless = {**BODY, "max_tokens": 4000}
    with process("--quiet") as (server, url), httpx.stream("POST", f"{url}/v1/completions", json=endless) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        server.send_signal(signal.SIGINT)
        server.wait(10)
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--served-model-name", "a", "--served-model-name", "b"], "expected 1 different names"),
        (["--api-key-file", "missing"], "missing cannot be read"),
        (["--host", "256.1.1.1"], "cannot listen there"),
        (["--port", "70000"], "expected a number from 0 to 65535"),
        (["--drain-seconds", "0"], "drain_seconds: got 0.0; expected a positive number"),
        (["--device", "cpu", "--max-seq-len", "100000"], "max_seq_len"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", str(DEMO), "--port", "0", "--quiet", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--model", str(DEMO), "--port", port, "--quiet"]) == 2
    assert "cannot listen there" in capsys.readouterr().err
