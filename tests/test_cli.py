"""The command as a user meets it: exit codes, one message, no traceback, text that streams."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_nvfp4
from moe_nvfp4.launch import cli

DEMO = Path(moe_nvfp4.__file__).parent / "demo"
COMMAND = [sys.executable, "-m", "moe_nvfp4.launch.cli"]
GENERATE = ["generate", "--model", str(DEMO), "--device", "cpu", "--quiet"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def test_generate_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--prompt", "Once upon a time", "--max-new-tokens", "8"]) == 0
    streamed = capsys.readouterr().out
    arguments = [*GENERATE, "--prompt", "Once upon a time", "--max-new-tokens", "8", "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"text", "token_ids", "finish_reason", "timing"}
    assert streamed == result["text"] + "\n"
    assert len(result["token_ids"]) == 8
    assert result["finish_reason"] == "length"
    assert {"load", "first_token", "total", "tokens_per_second"} <= set(result["timing"])


def test_generate_shows_plan_and_timing_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(DEMO), "--device", "cpu", "--chat", "Hello", "--max-new-tokens", "3"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "memory plan" in shown.err
    assert "tok/s" in shown.err
    assert "memory plan" not in shown.out


def test_prompt_ids_and_sampling_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--seed", "5"]
    outputs = []
    for _ in range(2):
        assert cli.main([*GENERATE, "--prompt-ids", "5,6,7", "--json", "--ignore-eos", *options]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert outputs[0] == outputs[1]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def lie_about_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def set_config(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}')


def index_missing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "absent.safetensors"}}')


def svd(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4_SVD"}}')


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (lie_about_the_header, "header claims"),
        (set_config(model_type="llama"), "llama"),
        (set_config(num_experts=7), "nothing uses"),
        (set_config(hidden_size=128), "config.json implies"),
        (set_config(num_hidden_layers=10**9), "num_hidden_layers"),
        (index_outside, "inside the checkpoint's folder"),
        (index_missing, "absent.safetensors"),
        (svd, "NVFP4_SVD"),
        (no_config, "config.json"),
    ],
)
def test_a_broken_checkpoint_gets_one_message(
    model: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    assert cli.main(["generate", "--model", str(model), "--prompt", "x", "--device", "cpu", "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("moe-nvfp4: error: ")
    assert message in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--prompt", ""], "empty"),
        ([*GENERATE, "--prompt", "word " * 5000], "max_seq_len"),
        ([*GENERATE, "--prompt-ids", "1,99999"], "ids 0 to"),
        ([*GENERATE, "--prompt-ids", "1,x"], "--prompt-ids"),
        ([*GENERATE, "--prompt", "x", "--top-p", "7"], "top_p"),
        ([*GENERATE, "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        ([*GENERATE, "--prompt", "x", "--dtype", "int4"], "dtype"),
        (["generate", "--model", "/nonexistent", "--prompt", "x"], "no such folder"),
        (["inspect", "/nonexistent"], "no such folder"),
        (["synthesize", "nobody/nothing", "/tmp/never-written"], "nvidia/Qwen3-30B-A3B-NVFP4"),
        (["synthesize", "nvidia/Qwen3-30B-A3B-NVFP4", str(DEMO), "--tiny"], "empty"),
    ],
)
def test_user_mistakes_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_nvfp4.streaming.stream", None)  # all of these are refused before a weight is read
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_synthesize_then_inspect_then_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "made")
    assert cli.main(["synthesize", "RedHatAI/Qwen3-30B-A3B-NVFP4", out, "--tiny", "--seed", "3"]) == 0
    assert cli.main(["inspect", out]) == 0
    assert "sound" in capsys.readouterr().out
    assert cli.main(["inspect", out, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert cli.main(["generate", "--model", out, "--prompt-ids", "1,2", "--device", "cpu", "--quiet"]) == 0


def test_inspect_of_a_broken_checkpoint_exits_non_zero(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_config(num_experts=7)(model)
    assert cli.main(["inspect", str(model)]) == 1
    assert "broken" in capsys.readouterr().out


def test_real_process_exit_codes_and_streams() -> None:
    done = run(*GENERATE, "--prompt", "Hello", "--max-new-tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")
    failed = run("generate", "--model", "/nonexistent", "--prompt", "x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert run("--version").stdout == f"moe-nvfp4 {moe_nvfp4.__version__}\n"
    assert run().returncode == 2


def test_interrupt_and_closed_pipe_end_quietly() -> None:
    endless = [*COMMAND, *GENERATE, "--prompt", "Hello", "--max-new-tokens", "3000", "--ignore-eos"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in errors
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.returncode == 128 + signal.SIGPIPE
        assert b"Traceback" not in process.stderr.read()
