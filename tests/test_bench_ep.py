"""`bench ep` over two ranks on the CPU: figures, what is counted, the check, and ranks that fail."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from model_checks import tiny_model
from ranks import fork_server

from moe_nvfp4.errors import EngineError
from moe_nvfp4.launch import bench_ep, cli
from moe_nvfp4.launch.bench_ep_rank import CHECKED_TOKENS, Checked, Settings, compare
from moe_nvfp4.launch.bench_exchanges import Exchange
from moe_nvfp4.launch.bench_model import Shares
from moe_nvfp4.parallel import Ranks

LAYERS = 2
MOST_SECONDS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("nvidia/Qwen3-30B-A3B-NVFP4", tmp_path_factory.mktemp("ep") / "model")


@pytest.fixture(autouse=True)
def _one_thread_and_no_orphans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tiny models are slower with more
    yield
    assert active_children() == []


@pytest.fixture
def imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not about how processes start, which takes seconds of each."""
    context = fork_server()
    monkeypatch.setattr(bench_ep.multiprocessing, "get_context", lambda method: context)


def settings_of(folder: Path) -> Settings:
    return Settings(
        model=str(folder),
        device="cpu",
        dtype="auto",
        batches=(1,),
        context=5,
        check=True,
        explain=False,
        symmetric=True,
        start_seconds=MOST_SECONDS,
        seconds=MOST_SECONDS,
    )


@pytest.mark.usefixtures("imported_once")
def test_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ep.json"
    options = ["--device", "cpu", "--batch", "1,3", "--context", "9", "--check", "--explain", "--json", str(out)]
    assert cli.main(["bench", "ep", "--model", str(folder), "--ranks", "2", *options]) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert figures["ranks"] == 2 and list(figures["ep"]) == ["one rank", "replicated", "tensor", "data"]
    for name, of_mode in figures["ep"].items():
        assert [one["batch"] for one in of_mode["decode"]] == [1, 3]
        for one in of_mode["decode"]:
            assert 0 < one["low"] <= one["milliseconds"] <= one["high"]
            assert one["tokens_per_second"] == pytest.approx(1e3 * one["batch"] / one["milliseconds"])
        if name == "one rank":
            continue
        assert of_mode["check"] == [{"same": 1.0, "behind": 0.0}] * 2
        seen = {one["exchange"]: one for one in of_mode["decode"][1]["exchanges"]}
        if name == "data":  # two rows at most on a rank, filled up to two on the other
            assert seen["all_gather 2x64 float32"]["a_step"] == seen["reduce_scatter 4x64 float32"]["a_step"] == LAYERS
            assert seen["all_gather 2x64 float32"]["bytes"] == seen["reduce_scatter 4x64 float32"]["bytes"] == 1024
        else:
            sums = seen["all_reduce 3x64 float32"]
            assert sums["a_step"] == (2 * LAYERS if name == "tensor" else LAYERS)
            assert sums["bytes_a_layer"] == 3 * 64 * 4 * sums["a_step"] / LAYERS
            assert sums["share"] > 0 and sums["microseconds"] > 0
    assert "all_gather 1x64 float32" in printed and "2 ranks: ms a step, tok/s" in printed


@pytest.mark.usefixtures("imported_once")
def test_no_speed_for_other_tokens(folder: Path) -> None:
    settings, lines = settings_of(folder), []
    expected = bench_ep.run_ranks(settings, 1, "replicated", None, lines.append)["checked"]
    assert any("tok/s" in line for line in lines)
    del lines[:]
    expected[0]["tokens"][3][0] = expected[0]["ids"][3][0][-1]  # the model may take it, and would not
    figures = bench_ep.run_ranks(settings, 2, "replicated", expected, lines.append)
    assert figures["check_passed"] is False and "decode" not in figures
    assert any("nothing is timed" in line for line in lines) and not any("tok/s" in line for line in lines)


@pytest.mark.usefixtures("imported_once")
def test_a_mode_that_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(bench_ep.Refused, match="4 attention heads cannot be shared out evenly over 3 ranks"):
        bench_ep.run_ranks(settings_of(folder), 3, "tensor", None, print)


@pytest.mark.parametrize(("sign", "message"), [(signal.SIGKILL, "died: signal SIGKILL"), (signal.SIGSTOP, "Nothing")])
def test_a_rank_that_fails_ends_all(folder: Path, sign: signal.Signals, message: str) -> None:
    """Killed, the bench says so at once; stopped, the others wait for it as long as they are told to."""
    settings = replace(settings_of(folder), batches=(1, 2, 3, 4), seconds=3.0)
    lines: list[str] = []

    def hurt() -> None:
        while not any("loaded" in line for line in lines):
            time.sleep(0.05)
        victim = max(active_children(), key=lambda process: process.pid or 0)
        os.kill(victim.pid or 0, sign)

    threading.Thread(target=hurt, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(EngineError, match=message) as caught:
        bench_ep.run_ranks(replace(settings, check=False), 2, "replicated", None, lines.append)
    assert "rank 1" in str(caught.value) and time.monotonic() - began < MOST_SECONDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1"], "--ranks: got 1"),
        (["--ranks", "2", "--attention", "data,some"], "--attention: got 'data,some'"),
        (["--ranks", "2", "--batch", "0"], "--batch: got '0'"),
        (["--ranks", "2", "--context", "0"], "--context: got 0"),
        (["--ranks", "2", "--device", "cuda:1"], "--device: got 'cuda:1'"),
    ],
)
def test_mistakes(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ep", "--device", "cpu", "--model", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_shares_of_a_batch() -> None:
    ranks = [Ranks(rank, 4, "data", torch.device("cpu"), None, None) for rank in range(4)]
    shares = [Shares.of(6, one) for one in ranks]
    assert [list(share.here) for share in shares] == [[0, 1], [2, 3], [4], [5]]
    whole = shares[2].whole(5)
    assert whole is not None and whole.sequences == (2, 2, 1, 1) and whole.tokens == (10, 10, 5, 5)
    assert [place[0] for place in whole.places] == [0, 0, 1, 1, 2, 3]
    assert shares[0].part(1, 7).counts == (1, 1, 0, 0)
    alike = Shares.of(6, replace(ranks[3], attention="tensor"))
    assert list(alike.here) == list(range(6)) and alike.whole() is None


def test_compare() -> None:
    ids, logprobs = list(range(CHECKED_TOKENS)), [-0.1 * place for place in range(CHECKED_TOKENS)]
    expected: Checked = {"tokens": [[0, 0]], "ids": [[ids, ids]], "logprobs": [[logprobs, logprobs]]}

    def found(*tokens: int) -> dict[str, float]:
        return compare({"tokens": [list(tokens)], "ids": [], "logprobs": []}, expected)

    assert found(0, 0) == {"same": 1.0, "behind": 0.0}
    assert found(0, 1) == {"same": 0.5, "behind": pytest.approx(1 / 19)}
    assert found(1, 400) == {"same": 0.0, "behind": 1.0}


def test_bytes_are_those_of_the_whole() -> None:
    assert Exchange("all_gather", (2, 8), torch.bfloat16).nbytes(4) == 128
    assert Exchange("reduce_scatter", (8, 8), torch.bfloat16).nbytes(4) == 128
    assert Exchange("all_reduce", (2, 8), torch.float32).nbytes(4) == 64
