"""`moe-nvfp4 bench kernels`: no time without a green check, and rates that follow from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_nvfp4.launch import bench_kernels
from moe_nvfp4.launch.bench_data import Shape
from moe_nvfp4.launch.bench_kernels import Result
from moe_nvfp4.launch.bench_timing import Ceilings, Timing
from moe_nvfp4.launch.cli import main

CEILINGS = Ceilings("a GPU", bytes_per_second=4e12, flops_per_second=8e14, l2_bytes=50_000_000)
TINY = Shape(8, 2, 256, 64, dense={"fp8": ("fp8", 512, 256), "nvfp4": ("nvfp4", 512, 256), "bf16": ("bf16", 512, 256)})


def test_rates() -> None:
    result = Result("shape", "kernel", 4, 1e-3, Timing(10.0, 9.5, 11.0), bytes=2e7, flops=4e9, peer=25.0)
    assert result.rates == pytest.approx((2e12, 4e14))
    assert result.share(CEILINGS) == pytest.approx(0.5)
    line = result.line(CEILINGS)
    assert "10.00 us (9.50 to 11.00)" in line and "2000 GB/s" in line and "400.0 TFLOP/s" in line and "50%" in line
    assert line.endswith("2.50 x")
    assert json.loads(json.dumps(result.to_json(CEILINGS)))["share"] == pytest.approx(0.5)


def test_a_red_case_has_no_time() -> None:
    timed = []
    for error in (0.02, float("nan"), float("inf")):
        result = bench_kernels._timed("shape", "kernel", 4, error, [lambda: timed.append(1)], 1.0, 1.0)
        assert result.timing is None and "RED" in result.line(CEILINGS) and "us" not in result.line(CEILINGS)
        assert result.to_json(CEILINGS)["share"] is None
    assert not timed


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--tokens", "1,x"], "--tokens: got '1,x'"),
        (["--tokens", "0"], "expected numbers from 1"),
        (["--shapes", "gpt-2"], "expected some of qwen3.6, gemma-4"),
    ],
)
def test_mistakes(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *arguments]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["uniform", "zipf", "one"])
def test_tiny(
    routing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "SHAPES", {"tiny": TINY})
    # With a real L2 there would be tens of thousands of such small weights in a graph.
    monkeypatch.setattr(bench_kernels, "measure_ceilings", lambda: replace(CEILINGS, l2_bytes=100_000))
    path = tmp_path / "figures.json"
    command = ["bench", "kernels", "--shapes", "tiny", "--tokens", "1,5,70", "--routing", routing, "--json", str(path)]
    assert main(command) == 0
    printed, figures = capsys.readouterr().out, json.loads(path.read_text())
    assert "RED" not in printed
    assert {"route", "sort", "experts, many"} <= {result["kernel"] for result in figures["results"]}
    assert all(result["timing"] is not None for result in figures["results"])
