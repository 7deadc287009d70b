"""`bench serve-offline`: all requests are answered in full, and the figures add up."""

import json
from pathlib import Path

import pytest
from model_checks import runner_of, tiny_model

from moe_nvfp4.launch import cli
from moe_nvfp4.launch.bench_serve_offline import Trace, bench_serve_offline, quantiles

NAME = "nvidia/Qwen3-30B-A3B-NVFP4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(NAME, tmp_path_factory.mktemp("serve") / "model")


def test_figures_add_up(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serve.json"
    options = ["--device", "cpu", "--requests", "12", "--prompt", "4,60", "--answer", "2,9", "--max-batch-size", "4"]
    assert cli.main(["bench", "serve-offline", "--model", str(folder), *options, "--json", str(out)]) == 0
    assert "12 requests" in capsys.readouterr().out
    figures = json.loads(out.read_text())["serve_offline"]
    lengths = Trace(12, (4, 60), (2, 9)).lengths()
    assert figures["tokens_in"] == sum(prompt for prompt, _ in lengths)
    assert figures["tokens_out"] == sum(answer for _, answer in lengths)
    assert figures["output_tokens_per_second"] == pytest.approx(figures["tokens_out"] / figures["seconds"])
    assert all(4 <= prompt <= 60 and 2 <= answer <= 9 for prompt, answer in lengths)


def test_a_shared_beginning_is_reused(folder: Path) -> None:
    trace = Trace(8, (150, 200), (2, 4), shared=128)
    with runner_of(folder, max_batch_size=2, max_seq_len=256) as runner:
        assert bench_serve_offline(runner, trace, lambda line: None)["reused_tokens"] >= 2 * 128
    with runner_of(folder, max_batch_size=2, max_seq_len=256, prefix_reuse=False) as runner:
        assert bench_serve_offline(runner, trace, lambda line: None)["reused_tokens"] == 0


@pytest.mark.parametrize(
    "options", [["--prompt", "9"], ["--prompt", "9,3"], ["--answer", "x"], ["--requests", "0"], ["--shared", "-1"]]
)
def test_bad_options_are_refused(folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve-offline", "--model", str(folder), "--device", "cpu", *options]) == 2
    assert "error" in capsys.readouterr().err


def test_quantiles() -> None:
    assert quantiles(list(range(100))) == {"p50": 49.5, "p90": 90, "p99": 99, "max": 99}
    assert quantiles([]) == {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
