"""`generate` over ranks, in every way that it can be started."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import moe_nvfp4
from moe_nvfp4.launch import cli, generate
from moe_nvfp4.synthesize import synthesize

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = Path(moe_nvfp4.__file__).parent / "demo"
MODULE = "moe_nvfp4.launch.generate"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "model"
    synthesize("nvidia/Qwen3-30B-A3B-NVFP4", out, tiny=True, seed=2, tokenizer=DEMO, vocab_size=1024)
    return out


def options(model: Path, *more: str) -> list[str]:
    """All of them say the same text."""
    text = ["--model", str(model), "--prompt", "The ranks of a group", "--max-new-tokens", "16", "--ignore-eos"]
    return [*text, "--temperature", "0.8", "--seed", "3", "--device", "cpu", "--json", "--quiet", *more]


@pytest.fixture
def expected(model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["generate", *options(model)]) == 0
    return told(capsys.readouterr().out)


def told(output: str) -> dict[str, Any]:
    (line,) = (line for line in output.splitlines() if line.startswith("{"))
    found = json.loads(line)
    return {key: found[key] for key in ("text", "token_ids", "finish_reason")}


def test_torchrun(model: Path, expected: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", MODULE, *options(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == expected


def test_a_submitted_job(cluster: Any, model: Path, expected: dict[str, Any]) -> None:
    """Of the code in the working directory: links and all travel with it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(ROOT), "--"]
    command += [sys.executable, "-m", MODULE, "--gpus", "2", "--attention", "tensor", *options(model)]
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.dashboard}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(done.stdout) == expected


def test_a_driver_that_is_interrupted_leaves_no_process(cluster: Any, model: Path) -> None:
    command = [sys.executable, "-m", MODULE, "--gpus", "2", "--model", str(model), "--prompt-ids", "1,2,3"]
    command += ["--max-new-tokens", "4000", "--ignore-eos", "--device", "cpu"]
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    said = ""
    while "decoded a first token" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.stdout.read(1)
    workers = [int(pid) for pid in re.findall(r"rank \d: .* process (\d+)", said)]
    assert len(workers) == 2 and all(map(alive, workers))
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, said + rest
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"--gpus: got None; expected a number of ranks from 1"),
        (("--gpus", "0"), r"--gpus: got 0; expected a number"),
        (("--gpus", "2", "--device", "cuda:1"), r"--device cuda:1: expected cpu or cuda"),
        (("--gpus", "2", "--self-test"), r"--self-test: compares the kernels of one GPU"),
        (("--gpus", "2", "--seed", str(1 << 70)), r"SamplingParams\.seed"),
    ],
)
def test_mistakes(model: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([*options(model), *more]) == cli.USER_ERROR
    assert re.search(message, capsys.readouterr().err)


def test_mistakes_under_torchrun(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert generate.main(options(model)) == cli.USER_ERROR
    assert "start with torchrun" in capsys.readouterr().err
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert generate.main(options(model, "--gpus", "4")) == cli.USER_ERROR
    assert "torchrun has started 2 ranks" in capsys.readouterr().err
