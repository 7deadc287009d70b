"""Grammars that loop, or want all memory, in processes that are really killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_nvfp4
from moe_nvfp4 import grammar_pool
from moe_nvfp4.errors import EngineError, RequestError
from moe_nvfp4.grammar import Grammars
from moe_nvfp4.grammar_pool import WorkerPool
from moe_nvfp4.sampling import Constraint
from moe_nvfp4.tokenizer import Tokenizer

pytest.importorskip("xgrammar")

FOR_EVER = "a?" * 2000  # minutes, in one call of the library
EOS = 1023


def demo() -> Tokenizer:
    tokenizer = Tokenizer.load(Path(moe_nvfp4.__file__).parent / "demo")
    assert tokenizer is not None
    return tokenizer


def demo_pool() -> WorkerPool:
    tokenizer = demo()
    return WorkerPool([b"" if t in tokenizer.special_ids else tokenizer.token_bytes(t) for t in range(1024)], [EOS])


def of(pattern: str) -> Constraint:
    return Constraint("regex", pattern)


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerPool]:
    made = demo_pool()
    yield made
    made.close()


@pytest.fixture
def pool(shared: WorkerPool) -> WorkerPool:
    """With a worker that is ready."""
    shared.try_out(of("a"))
    return shared


def refused(pool: WorkerPool, constraint: Constraint) -> str:
    with pytest.raises(RequestError) as caught:
        pool.try_out(constraint)
    return str(caught.value)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(what: object, seconds: float = 120) -> None:
    assert callable(what)
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_what_never_ends_is_killed_and_others_go_on(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_pool, "COMPILE_SECONDS", 1.0)
    monkeypatch.setattr(grammar_pool, "RESERVE_SECONDS", 0.1)
    first = pool.pids
    began = time.monotonic()
    assert "not compiled within 1 s; make it simpler" in refused(pool, of(FOR_EVER))
    assert time.monotonic() - began < 10
    assert not any(map(is_running, first))
    monkeypatch.undo()
    pool.try_out(of("[0-9]+"))
    ready = pool.pids
    pool.try_out(of("[a-z]+"))
    assert pool.pids == ready, "nothing more to start"


def test_what_never_ends_makes_room(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than workers: each has its fair time, and a good one is not refused."""
    monkeypatch.setattr(grammar_pool, "FAIR_SECONDS", 0.2)
    monkeypatch.setattr(grammar_pool, "COMPILE_SECONDS", 300.0)  # the first is still at it when the second has started
    errors = list[str]()
    bad = [threading.Thread(target=lambda n=n: errors.append(refused(pool, of(FOR_EVER + str(n))))) for n in range(2)]
    for thread in bad:
        thread.start()
    wait_for(lambda: len([worker for worker in pool._busy if worker.began]) == grammar_pool.WORKERS)
    pool.try_out(of("good"))
    assert len(errors) >= 1
    assert all("while others wait" in error for error in errors)
    for worker in list(pool._busy):
        worker.kill()
    for thread in bad:
        thread.join(60)
    assert len(errors) == 2


def test_a_queue_has_an_end(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_pool, "WORKERS", 0)
    monkeypatch.setattr(grammar_pool, "MAX_WAITING", 0)
    assert "too many grammars are being compiled; retry" in refused(pool, of("b"))
    monkeypatch.setattr(grammar_pool, "MAX_WAITING", 1)
    monkeypatch.setattr(grammar_pool, "WAIT_SECONDS", 0.05)
    idle, pool._idle = pool._idle, []
    assert "too many grammars are being compiled; retry" in refused(pool, of("b"))
    pool._idle = idle


def test_a_worker_that_dies_is_replaced(pool: WorkerPool) -> None:
    (*_, pid) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    dying = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    dying.start()
    assert "ended the process that did it" in refused(pool, of("abc"))
    dying.join()
    pool.try_out(of("abc"))
    (*_, idle) = pool.pids
    assert idle != pid
    os.kill(idle, signal.SIGKILL)
    wait_for(lambda: not is_running(idle))
    pool.try_out(of("abc"))


def test_a_worker_whose_pipe_has_closed_is_not_taken_again(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pool._idle[-1]
    monkeypatch.setattr(worker._process, "poll", lambda: None)
    os.kill(worker.pid, signal.SIGKILL)
    assert "ended the process that did it" in refused(pool, of("abc"))
    pool.try_out(of("abc"))
    assert not is_running(worker.pid)


def test_memory_has_a_limit(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = json.dumps({"enum": [f"{'x' * 20}{number}" for number in range(20_000)]})
    monkeypatch.setattr(grammar_pool, "MEMORY_BYTES", 16 << 20)
    assert "memory" in refused(pool, Constraint("json_schema", words))
    pool.try_out(of("abc"))


def test_a_pattern_that_is_slow_to_follow_is_refused(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_pool, "COMPILE_SECONDS", 60.0)
    assert "longer than 20 ms to check; make it simpler" in refused(pool, of("a?" * 400))


def test_the_end_leaves_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    grammars = Grammars(demo(), 1024, frozenset([EOS]))
    grammars.check(of("a"))
    assert grammars._built is not None
    pool = grammars._built[1]
    pids = pool.pids
    assert all(map(is_running, pids))
    ended: list[Exception | None] = []

    def loop() -> None:
        with pytest.raises(EngineError, match="closed") as caught:
            grammars.check(of(FOR_EVER))
        ended.append(caught.value)

    looping = threading.Thread(target=loop)
    looping.start()
    wait_for(lambda: any(worker.began for worker in pool._busy))
    grammars.close()
    looping.join(60)
    assert len(ended) == 1
    assert not any(map(is_running, pids))
    assert len(os.listdir("/proc/self/fd")) == before
    grammars.check(of("a"))  # it is kept
    with pytest.raises(EngineError, match="closed"):
        grammars.check(of("b"))


def test_a_worker_ends_with_its_parent() -> None:
    """Also one in a loop, by a clock of its own."""
    script = f"""
import threading, time
from test_grammar_pool import demo_pool, grammar_pool, of
grammar_pool.COMPILE_SECONDS = 1.0
pool = demo_pool()
pool.try_out(of("a"))
looping = threading.Thread(target=pool.try_out, args=(of({FOR_EVER!r}),), daemon=True)
looping.start()
while not (pool._busy and pool._busy[0].began):
    time.sleep(0.01)
print(pool.pids[-1], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parent) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    wait_for(lambda: not is_running(worker))
