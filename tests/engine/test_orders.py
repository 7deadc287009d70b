"""Ranks in step: a leader and a follower with a whole model each take the same turns, whatever clients do."""

import json
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_checks import runner_of, tiny_model

from moe_nvfp4.engine.invariants import check
from moe_nvfp4.engine.loop import Engine
from moe_nvfp4.engine.order_link import Line, Lines
from moe_nvfp4.engine.orders import (
    Call,
    Cancel,
    Close,
    Diverged,
    FollowerOrders,
    Late,
    LeaderOrders,
    Submit,
    decode,
    encode,
)
from moe_nvfp4.errors import RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

KEY = b"k" * 32
SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("nvidia/Qwen3.6-35B-A3B-NVFP4", tmp_path_factory.mktemp("orders") / "model")


def pair(folder: Path, **settings: Any) -> tuple[MoERunner, MoERunner]:
    prepared = [MoERunner.prepare(folder, device="cpu", verbose=False, **settings) for _ in range(2)]
    lines = Lines("127.0.0.1", KEY)
    line = Line("127.0.0.1", lines.port, KEY, 1, SECONDS)
    lines.accept(1, SECONDS)
    leader = MoERunner(prepared[0], lambda build: LeaderOrders(lines))
    return leader, MoERunner(prepared[1], lambda build: FollowerOrders(line, build))


@pytest.fixture
def two(folder: Path) -> Iterator[tuple[MoERunner, MoERunner]]:
    leader, follower = pair(folder, max_batch_size=3, max_seq_len=256)
    yield leader, follower
    leader.close()
    follower.engine._thread.join(timeout=SECONDS)
    assert not follower.engine._thread.is_alive(), "the leader's end is the follower's"
    follower.close()


def tokens_of_all(engine: Engine) -> int:
    """When the leader's call has returned, the follower has landed the same or is about to."""
    return engine.call(lambda: engine._digest)


def check_equal(leader: MoERunner, follower: MoERunner) -> None:
    digest = tokens_of_all(leader.engine)
    leader.engine.call_everywhere("meet")
    assert follower.engine._digest == digest
    for runner in (leader, follower):
        check(runner.engine.scheduler)
        assert runner.engine.free_slots == 3 and not runner.engine._open
        assert all(pool.held == 0 for pool in runner.engine.scheduler.memory.pools)
    pools = [[vars(pool) for pool in runner.engine.scheduler.memory.pools] for runner in (leader, follower)]
    assert pools[0] == pools[1], "pages lie elsewhere"


def test_a_follower_does_what_its_leader_does(two: tuple[MoERunner, MoERunner], folder: Path) -> None:
    """Requests that come, end, are cancelled and are late, of all priorities and with chance in sampling."""
    leader, follower = two
    met = threading.Barrier(2)
    for runner in two:
        runner.engine.named["meet"] = lambda: met.wait(SECONDS) * 0
    generator = random.Random(0)
    asked = [[generator.randrange(400) for _ in range(generator.choice((1, 70, 130)))] for _ in range(10)]
    params = [
        SamplingParams(
            max_new_tokens=12,
            ignore_eos=True,
            temperature=generator.choice((0.0, 0.9)),  # without a seed: one is drawn
            priority=generator.randrange(2),
            frequency_penalty=generator.choice((0.0, 0.5)),
        )
        for _ in asked
    ]
    stream = leader.stream(asked[0], replace(params[0], max_new_tokens=100))
    next(stream)

    def come_too_late() -> None:
        with pytest.raises(RequestError):
            leader.generate([1], LATE)

    late = threading.Thread(target=come_too_late)
    late.start()
    results = leader.generate(asked, params)
    stream.close()
    late.join(SECONDS)
    check_equal(leader, follower)
    with runner_of(folder, max_batch_size=3, max_seq_len=256) as alone:
        for prompt, one, result in zip(asked, params, results, strict=True):
            if one.greedy:
                assert alone.generate(prompt, one).token_ids == result.token_ids
    with pytest.raises(RuntimeError, match="follows another"):
        follower.generate([1], params[0])


LATE = SamplingParams(max_new_tokens=200, ignore_eos=True, timeout=0.05)


def test_a_rank_that_computes_something_else_is_noticed(two: tuple[MoERunner, MoERunner]) -> None:
    leader, follower = two
    follower.engine._digest = 1
    with pytest.raises(ConnectionError, match="rank 1 has gone"):
        leader.generate([1, 2, 3], SamplingParams(max_new_tokens=200, ignore_eos=True))
    follower.engine._thread.join(timeout=SECONDS)
    assert isinstance(follower.engine._broken, Diverged)


def test_a_follower_whose_leader_is_gone_ends(folder: Path) -> None:
    leader, follower = pair(folder)
    leader.engine._orders.close()  # as if its process were killed
    follower.engine._thread.join(timeout=SECONDS)
    assert "rank 0 has gone" in str(follower.engine._broken)
    leader.close()
    follower.close()


def test_a_leader_whose_follower_is_gone_ends(folder: Path) -> None:
    leader, follower = pair(folder)
    follower.close()
    with pytest.raises(ConnectionError, match="rank 1 has gone"):
        leader.generate([1, 2], SamplingParams(max_new_tokens=200, ignore_eos=True))
    leader.close()


def test_an_answer_goes_on_from_its_tokens(folder: Path) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.9, seed=5, frequency_penalty=0.5)
    prompt = list(range(70))
    with runner_of(folder) as runner:
        whole = runner.generate(prompt, params)
        answer = runner.answer(prompt, list(whole.token_ids[:7]), params, 0)
        arrived: list[Any] = []
        done = threading.Event()

        def sink(item: Any) -> None:
            arrived.append(item)
            if isinstance(item, Exception) or item.completion is not None:
                done.set()

        runner.engine.submit(answer, sink)
        assert done.wait(SECONDS)
    assert tuple(token for item in arrived for token in item.token_ids) == whole.token_ids[7:]
    assert arrived[-1].completion.token_ids == whole.token_ids
    assert arrived[-1].completion.timing.prompt_tokens == 70


def test_orders_survive_the_wire(folder: Path) -> None:
    params = SamplingParams(
        seed=3, temperature=0.7, stop=("a",), logit_bias={5: 1.5}, stop_token_ids=(7,), priority=2, logprobs=3, n=2
    )
    with runner_of(folder) as runner:
        params = replace(params, stop=())  # this checkpoint has no tokenizer
        sent = runner.answer([1, 2, 3], [8, 9], params, 1)
        sent.sequence.ident = 77
        got = decode(json.loads(encode(Submit(sent))), runner.answer)
        assert isinstance(got, Submit)
        one, other = got.answer, sent
        assert (one.params, one.choice, one.new_ids) == (other.params, other.choice, [8, 9])
        for field in ("ident", "tokens", "prompt_length", "priority", "max_length", "max_new_tokens"):
            assert getattr(one.sequence, field) == getattr(other.sequence, field)
        assert one.sampler.uniform() == other.sampler.uniform()
        for order in (Cancel(3), Late([1, 2]), Close()):
            assert decode(json.loads(encode(order)), runner.answer) == order
        call = decode(json.loads(encode(Call("swap", {"layer": 3}))), runner.answer)
        assert isinstance(call, Call) and (call.name, call.arguments) == ("swap", {"layer": 3})
        assert encode(replace(Submit(sent), encoded=b"as it is")) == b"as it is"
        with pytest.raises(ValueError, match="another version"):
            decode({"order": "Dance"}, runner.answer)


def test_strangers_do_not_become_ranks() -> None:
    lines = Lines("127.0.0.1", KEY)
    silent = socket.create_connection(("127.0.0.1", lines.port))
    silent.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: everything\r\n\r\n")
    stranger = Line("127.0.0.1", lines.port, b"x" * 32, 1, SECONDS)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] have not connected"):
        lines.accept(1, 0.5)
    for closing in (silent, stranger, lines):
        closing.close()
