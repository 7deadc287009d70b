"""Which numbers of rows get graphs; that graphs give what the model gives is in test_models.py."""

from pathlib import Path

import pytest
import torch
from model_checks import runner_of, tiny_model

from moe_nvfp4 import SamplingParams, expert_loads
from moe_nvfp4.row_graphs import RowGraphsBySize, Shared, row_buckets

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [1, 32, 33, 100, 512, 4096, 4608])
def test_no_step_is_filled_up_by_much(most: int) -> None:
    sizes = row_buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max(most, 32) and len(sizes) <= 25
    by_size = RowGraphsBySize(sizes, Shared(most, CPU, False), lines=None)
    for rows in range(1, most + 1):
        graphs = by_size.of(rows)
        assert graphs is not None and graphs.rows in sizes and rows <= graphs.rows
        assert graphs.rows - rows < 32 or graphs.rows - rows < graphs.rows / 5
        assert by_size.of(rows) is graphs
    assert by_size.of(sizes[-1] + 1) is None


def test_parts_take_their_rows_from_each_other() -> None:
    """Rows carried on stay as many as the graphs have; what is given is cut to the step's."""
    graphs = RowGraphsBySize([32, 64], Shared(64, CPU, False), lines=None).of(40)
    assert graphs is not None and not graphs.captures and graphs.step is None
    seen = []

    def double(x: torch.Tensor, *brought: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen.append([len(one) for one in (x, *brought)])
        y = 2 * x + sum(brought, start=torch.zeros(()))
        return y, [y + 1]

    x = torch.randn(40, 3)
    carried, (given,) = graphs.run(0, double, x)
    assert len(carried) == 64 and torch.equal(given, 2 * x + 1)
    carried, (given,) = graphs.run(1, double, carried, given)
    torch.testing.assert_close(given, 6 * x + 2)
    assert seen == [[64], [64, 64]]
    _, (again,) = graphs.run(0, double, x[:33])
    assert torch.equal(again, 2 * x[:33] + 1)


def test_steps_of_ranks_say_which_rows_count() -> None:
    graphs = RowGraphsBySize([32, 64], Shared(64, CPU, False), lines=2).of(5)
    assert graphs is not None and graphs.step is not None
    assert graphs.step.padded == 32 and graphs.step.live_G.tolist() == [0, 0]


@pytest.mark.gpu
def test_rows_of_steps_that_capture_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_loads, "READ_EVERY", 0.0)
    folder = tiny_model("nvidia/Qwen3-30B-A3B-NVFP4", tmp_path / "model")
    settings = {"device": "cuda", "dtype": "bfloat16", "count_experts": True, "prefix_reuse": False}
    with runner_of(folder, **settings) as runner:
        assert runner.expert_loads is not None
        for count in (1, 2):  # the second finds its graphs
            runner.generate(list(range(40)), SamplingParams(max_new_tokens=3, ignore_eos=True))
            computed = count * (40 + 2) * runner.config.experts_per_token
            assert {sum(rows) for rows in runner.expert_loads.rows().values()} == {computed}
