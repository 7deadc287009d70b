"""A Ray cluster for all tests, as `ray start` makes it: four CPUs, a dashboard that takes jobs; a server and a client.

What needs an extra is imported where it is used: other tests of this folder run without.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import openai
    from serving import Serving

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # of 15 a worker gets hardly any time beside other tests, and counts as one that hangs
}


@dataclass(frozen=True)
class Cluster:
    address: str
    dashboard: str
    environment: dict[str, str]
    add_node: Callable[[], subprocess.Popen]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ray_start(environment: dict[str, str], log: Path, *options: str, agent: int) -> subprocess.Popen:
    """A node that lives as long as this process. `agent`: the port of what starts its jobs; Ray's own is the same for
    every node of a machine."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
    command.append(f"--dashboard-agent-listen-port={agent}")
    with open(log, "wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def stop(node: subprocess.Popen) -> None:
    node.terminate()
    try:
        node.wait(timeout=20)
    except subprocess.TimeoutExpired:
        node.kill()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    os.environ.update(WORKER_ENVIRONMENT)  # read by ray.init, and by nodes and workers that inherit it
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the path of a Unix socket may have 107 bytes
    port, dashboard, agent = free_port(), free_port(), free_port()
    address, nodes = f"127.0.0.1:{port}", []
    options = [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4", f"--temp-dir={folder}"]
    options += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    nodes.append(ray_start(environment, folder / "head.log", "--head", *options, agent=agent))

    def add_node() -> subprocess.Popen:
        log = folder / f"node{len(nodes)}.log"
        one = ray_start(environment, log, f"--address={address}", "--num-cpus=1", agent=free_port())
        nodes.append(one)
        return one

    try:
        deadline = time.monotonic() + 120
        while "To terminate the Ray runtime" not in (log := (folder / "head.log").read_text()) or not listens(agent):
            assert nodes[0].poll() is None and time.monotonic() < deadline, log
            time.sleep(0.2)
        ray.init(address=address, log_to_driver=False)
        yield Cluster(address, f"http://127.0.0.1:{dashboard}", environment, add_node)
        ray.shutdown()
    finally:
        for node in reversed(nodes):
            stop(node)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Serving]":
    """The model `demo`, and `tools` with a template of Qwen3's kind."""
    from serving import HERMES, demo_runner, demo_with, serving

    folder = demo_with(tmp_path_factory.mktemp("served") / "tools", HERMES)
    with demo_runner() as plain, demo_runner(folder) as tools, serving({"demo": plain, "tools": tools}) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: "Serving") -> "Iterator[openai.OpenAI]":
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
