"""Rows of experts: those of a whole run against the routers of the reference model; and one account for all who ask."""

import time

import pytest
import torch
from reference import reference_model
from serving import DEMO, demo_runner

from moe_nvfp4 import SamplingParams, expert_loads
from moe_nvfp4.errors import EngineError
from moe_nvfp4.expert_loads import ExpertLoads, Rows

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], list(range(20, 60))]


def expected_rows(sequences: list[list[int]]) -> Rows:
    model, rows = reference_model(DEMO), Rows()
    for ids in sequences:
        with torch.inference_mode():
            out = model(torch.tensor([ids]), output_router_logits=True)
        for layer, logits_TE in enumerate(out.router_logits):
            chosen = logits_TE.topk(model.config.num_experts_per_tok).indices.flatten()
            counts = torch.bincount(chosen, minlength=model.config.num_experts).tolist()
            rows[layer] = [one + more for one, more in zip(rows.get(layer, [0] * len(counts)), counts, strict=True)]
    return rows


def test_rows_are_those_of_the_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_loads, "READ_EVERY", 0.0)
    with demo_runner(count_experts=True, prefix_reuse=False) as runner:
        assert runner.expert_loads is not None
        answers = runner.generate(PROMPTS, SamplingParams(max_new_tokens=6, ignore_eos=True))
        # The last token of an answer is not computed.
        computed = [[*prompt, *answer.token_ids[:-1]] for prompt, answer in zip(PROMPTS, answers, strict=True)]
        assert runner.expert_loads.rows() == expected_rows(computed)
        assert runner.expert_loads.take() == runner.expert_loads.rows()
        assert not any(map(sum, runner.expert_loads.take().values()))
    with demo_runner() as runner:
        assert runner.expert_loads is None
        assert [a.token_ids for a in runner.generate(PROMPTS, SamplingParams(max_new_tokens=6, ignore_eos=True))] == [
            a.token_ids for a in answers
        ]


def test_one_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes what is new changes nothing for those who look; a group that is loaded again begins at zero."""
    now: Rows = {0: [4, 0, 4], 1: [1, 3, 4]}
    looks = 0

    def read() -> Rows:
        nonlocal looks
        looks += 1
        if not now:
            raise EngineError("closed")
        return {layer: list(rows) for layer, rows in now.items()}

    loads = ExpertLoads(read, routed=2)
    assert loads.rows() == loads.rows() == {0: [4, 0], 1: [1, 3]} and looks == 1
    now = {0: [5, 1, 6], 1: [1, 5, 6]}
    assert loads.rows() == {0: [4, 0], 1: [1, 3]} and looks == 1, "within the second"
    assert loads.take() == {0: [5, 1, 6], 1: [1, 5, 6]}
    assert loads.rows() == {0: [5, 1], 1: [1, 5]}
    now = {0: [0, 1, 1], 1: [1, 0, 1]}
    assert loads.take() == now
    assert loads.rows() == {0: [5, 2], 1: [2, 5]}
    monkeypatch.setattr(expert_loads, "READ_EVERY", 0.0)
    now = {0: [0, 2, 2], 1: [2, 0, 2]}
    until = time.monotonic() + 10
    while loads.known() != {0: [5, 3], 1: [3, 5]}:
        assert time.monotonic() < until
        time.sleep(0.001)
    now = {}
    assert loads.rows() == {0: [5, 3], 1: [3, 5]}
    with pytest.raises(EngineError):
        loads.take()
