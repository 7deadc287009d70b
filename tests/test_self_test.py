"""`generate --self-test`: passes on sound kernels, and says which check fails on broken ones."""

from pathlib import Path

import pytest
import torch
from model_checks import runner_of, tiny_model

from moe_nvfp4.kernels.routed_experts import routed_experts
from moe_nvfp4.self_test import EXPERT_ROWS, Check, self_test

NAMES = ["nvidia/Qwen3-30B-A3B-NVFP4", "nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4"]
DENSE = "nvidia/Gemma-4-31B-IT-NVFP4"


@pytest.mark.parametrize("name", [*NAMES, DENSE])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_passes(name: str, device: str, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = tiny_model(name, tmp_path / "model", for_kernels=device == "cuda")
    with runner_of(folder, device=device, dtype="bfloat16") as runner:
        assert self_test(runner, lines.append)
    assert all("ok" in line for line in lines)
    assert sum("experts" in line for line in lines) == (0 if name == DENSE else 2 * len(EXPERT_ROWS))
    assert any("prefill" in line for line in lines)
    assert any("delta net" in line for line in lines) == ("3.6" in name)


def test_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        y = routed_experts(x, *arguments)
        y[-1] *= 1.5
        return y

    monkeypatch.setattr("moe_nvfp4.self_test.routed_experts", broken)
    lines: list[str] = []
    with runner_of(tiny_model(NAMES[0], tmp_path / "model"), dtype="bfloat16") as runner:
        assert not self_test(runner, lines.append)
    assert "WRONG" in next(line for line in lines if "1 rows" in line)


def test_nan_is_no_pass() -> None:
    assert not Check("x", float("nan")).passed
