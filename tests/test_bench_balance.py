"""The simulation of balance: its loads are what they say, and its figures agree with each other."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_nvfp4.launch import cli
from moe_nvfp4.launch.bench_balance import TRACES, Model, plain_greedy, popularity, run_trace, windows

ROOT = Path(__file__).resolve().parent.parent
SMALL = Model(3, 64, 8)
SIMILAR = ("uniform", "zipf 0.4", "domains")  # what was placed for one window is little better for the next


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2, 3.0])
def test_no_expert_is_taken_twice_by_a_token(exponent: float) -> None:
    shares = popularity(128, exponent, 8)
    assert shares.sum() == pytest.approx(1) and shares.max() <= 1 / 8 * (1 + 1e-6)
    assert (np.diff(shares) <= 1e-12).all()


@pytest.mark.parametrize("trace", TRACES)
def test_figures(trace: str) -> None:
    figures = run_trace(trace, SMALL, ranks=8, spare=2)
    for part in ("first_window", "later_windows"):
        balance = figures[part]
        assert 0 < balance["even"] <= balance["best"] <= 1
        assert balance["best"] * 0.96 <= balance["after"] <= balance["best"]
    assert figures["first_window"]["last"] == figures["first_window"]["even"], "nothing is known yet"
    assert figures["later_windows"]["last"] > 1.1 * figures["later_windows"]["even"] or trace in SIMILAR
    assert figures["reads_per_layer"][1] <= figures["greedy_reads_per_layer"][1]


def test_windows_change_as_they_say() -> None:
    def common(trace: str) -> float:
        one, two = (next_window for next_window, _ in zip(windows(trace, SMALL), range(2), strict=False))
        return float(np.corrcoef(one.ravel(), two.ravel())[0, 1])

    assert common("zipf 0.8") > common("drifting") + 0.005 > common("domains") + 0.005


def test_the_plain_greedy_fills_all_slots() -> None:
    slots = plain_greedy(np.array([10.0, 1, 1, 1, 1, 1]), slots=4, ranks=2)
    assert sorted(map(len, slots)) == [4, 4] and sum(held.count(0) for held in slots) == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "balance.json"
    command = ["bench", "balance", "--shape", "qwen3.6-35b", "--ranks", "4", "--slots", "0,1", "--trace", "zipf 0.4"]
    assert cli.main([*command, "--json", str(target)]) == 0
    results = json.loads(target.read_text())["results"]
    assert [figures["slots_per_rank"] for figures in results] == [64, 65]
    printed = capsys.readouterr().out
    assert "4 ranks, 64 + 1 slots" in printed and f"{results[1]['first_window']['after']:.3f}" in printed
    assert cli.main(["bench", "balance", "--trace", "weekly"]) == 2
    assert "--trace: got 'weekly'; expected all or one of uniform" in capsys.readouterr().err


def test_the_plot_is_of_the_committed_figures(tmp_path: Path) -> None:
    drawn = tmp_path / "balance.svg"
    script, figures = ROOT / "benchmarks/plot_balance.py", ROOT / "benchmarks/results/balance.json"
    subprocess.run([sys.executable, script, figures, drawn], check=True, timeout=120)
    assert drawn.read_text() == (ROOT / "benchmarks/balance.svg").read_text()
