"""The simulation of the scheduler: nothing is lost on any trace, and its figures are what they say."""

import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from moe_nvfp4.engine.scheduler import Rows, Sequence, Step
from moe_nvfp4.launch import cli
from moe_nvfp4.launch.bench_schedule import TRACES, Distribution, Simulation, step_seconds
from moe_nvfp4.launch.schedule_traces import scene


@pytest.mark.parametrize("trace", TRACES)
def test_nothing_is_lost(trace: str) -> None:
    """What the simulation asserts at each step holds, everything else at every sixteenth."""
    figures = Simulation(trace, 1000, every=16, seed=1).run()
    assert sum(figures["ended"].values()) == 1000
    assert 0 < figures["first_token_ms"]["p50"] <= figures["first_token_ms"]["p99"] <= figures["first_token_ms"]["max"]
    if figures["ended"] == {"answered": 1000}:
        assert figures["rows"] >= figures["prompt_tokens"] - figures["reused_tokens"]


def test_the_adversary_reaches_what_it_is_for() -> None:
    figures = Simulation("adversarial", 1500).run()
    assert figures["preemptions"] > 0 and figures["reused_tokens"] > 0
    assert {"answered", "cancelled", "late"} <= figures["ended"].keys()


def test_the_same_seed_gives_the_same_times() -> None:
    one, two = (Simulation("bursty", 100, seed=3).run() for _ in range(2))
    del one["host_microseconds_per_step"], two["host_microseconds_per_step"]
    assert one == two


def test_distributions() -> None:
    times = Distribution()
    for milliseconds in range(1, 1001):
        times.add(float(milliseconds))
    assert times.quantiles((0.5, 0.9, 1.0)) == pytest.approx([500, 900, 1000], rel=0.011)
    assert times.figures()["max"] == 1000.0
    assert Distribution().figures()["p99"] == 0.0


def test_the_model_of_step_times() -> None:
    def rows(count: int, *, continues: bool) -> Rows:
        return Rows(Sequence(0, [1], 1, 1), 0, count, True, continues)

    assert step_seconds(Step((rows(1, continues=True),))) == pytest.approx(1.52e-3)
    assert step_seconds(Step((rows(1, continues=True),) * 96)) == pytest.approx((7.86 + 11.6) / 2e3)
    prefill = step_seconds(Step((rows(2048, continues=False),) * 2))
    assert 4096 / prefill == pytest.approx(69_200, rel=0.01), "prompts of 2048 tokens in steps of 4096"
    for prompts, prompt, measured in ((1, 128, 15.7), (1, 384, 19.2), (2, 448, 24.5), (4, 480, 35.7), (8, 496, 58.5)):
        mixed = Step((rows(1, continues=True),) * 128 + (rows(prompt, continues=False),) * prompts)
        assert step_seconds(mixed) == pytest.approx(measured / 1e3, rel=0.1)


@pytest.mark.parametrize("trace", TRACES)
def test_traces_are_in_order_and_fit(trace: str) -> None:
    stage = scene(trace, 300)
    requests = list(stage.requests)
    assert [r.ident for r in requests] == list(range(300))
    assert all(a.arrival <= b.arrival for a, b in pairwise(requests))
    assert all(r.prompt and 0 < r.new_tokens <= r.max_new_tokens for r in requests)


def test_the_command(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.svg")]
    assert cli.main(["bench", "schedule", "--requests", "60", *files]) == 0
    assert [t["trace"] for t in json.loads((tmp_path / "s.json").read_text())["traces"]] == list(TRACES)
    assert len(ET.parse(tmp_path / "s.svg").getroot().findall(".//{*}polyline")) == 12
    assert cli.main(["bench", "schedule", "--requests", "2"]) == 2
