"""`bench decode`, `bench prefill` and `bench steps` on a tiny model: figures, floors, errors."""

import json
from pathlib import Path

import pytest
from model_checks import runner_of, tiny_model

from moe_nvfp4.launch import cli
from moe_nvfp4.launch.bench_model import TIMED_STEPS
from moe_nvfp4.launch.step_explanation import kind_of

NAMES = ["nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("bench") / "model")


def test_decode_writes_its_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    options = ["--device", "cpu", "--batch", "1,3", "--context", "9", "--json", str(out)]
    assert cli.main(["bench", "decode", "--model", str(folder), *options]) == 0
    assert "batch    3" in capsys.readouterr().out
    figures = json.loads(out.read_text())["decode"]
    assert [figure["batch"] for figure in figures] == [1, 3]
    for figure in figures:
        assert 0 < figure["low"] <= figure["milliseconds"] <= figure["high"]
        assert figure["tokens_per_second"] == pytest.approx(1e3 * figure["batch"] / figure["milliseconds"])
    assert figures[0]["bytes"] < figures[1]["bytes"]
    assert TIMED_STEPS >= 32


def test_prefill_writes_its_figures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    options = ["--device", "cpu", "--prompts", "1,2", "--length", "20", "--json", str(out)]
    assert cli.main(["bench", "prefill", "--model", str(folder), *options]) == 0
    assert [figure["prompts"] for figure in json.loads(out.read_text())["prefill"]] == [1, 2]


def test_steps_write_their_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.json"
    options = ["--device", "cpu", "--rows", "9,40", "--answers", "0,12", "--json", str(out)]
    assert cli.main(["bench", "steps", "--model", str(folder), *options]) == 0
    figures = json.loads(out.read_text())["steps"]
    assert [(one["rows"], one["answers"]) for one in figures] == [(9, 0), (40, 0), (40, 12)]
    assert all(0 < one["launch"] <= one["milliseconds"] and one["low"] <= one["high"] for one in figures)
    assert "  12 of answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "8", "--answers", "8"], "--answers: got '8'; expected one below 8"),
        (["--rows", "4,100000"], "a step of this model has at most"),
    ],
)
def test_steps_that_cannot_be_are_refused(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "steps", "--model", str(folder), "--device", "cpu", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--batch", "0"], ["--batch", "x"], ["--batch", ""], ["--context", "0"], ["--context", "999999999"]]
)
def test_bad_numbers_are_refused(folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "decode", "--model", str(folder), "--device", "cpu", *options]) == 2
    assert "error" in capsys.readouterr().err


def test_every_weight_is_counted_once(folder: Path) -> None:
    """With a batch that reaches all experts, a step moves all weights; of an untied embedding only rows."""
    with runner_of(folder) as runner:
        moved = runner.step_bytes.by_kind([1] * 10**6)
        unread = 0 if runner.config.tied else runner.model.embed.nbytes
        weights = sum(nbytes for kind, nbytes in moved.items() if kind != "cache")
        assert weights == pytest.approx(runner.plan.experts + runner.plan.dense - unread)


def test_experts_of_one_token(folder: Path) -> None:
    with runner_of(folder) as runner:
        config = runner.config
        shared = runner.experts.placement.num_experts - config.num_experts
        share = (config.experts_per_token + shared) / runner.experts.placement.num_experts
        assert runner.step_bytes.by_kind([1])["experts"] == pytest.approx(runner.plan.experts * share)


def test_kernels_have_kinds() -> None:
    assert kind_of("gate_up_pairs") == "experts"
    assert kind_of("dense_rows_kernel") == "dense"
    assert kind_of("step_heads") == "cache"
    assert kind_of("something new") == "other"
