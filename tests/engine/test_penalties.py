"""Penalties and biases against their definition, one token at a time."""

from collections.abc import Iterator

import pytest
import torch
from model_checks import runner_of, tiny_model

from moe_nvfp4.engine.penalties import ROWS_AT_ONCE, Penalties
from moe_nvfp4.errors import RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

PROMPT = [5, 5, 9, 30, 31, 32]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoERunner]:
    folder = tiny_model("nvidia/Qwen3-30B-A3B-NVFP4", tmp_path_factory.mktemp("penalties") / "model")
    with runner_of(folder, max_batch_size=3, max_seq_len=128) as runner:
        yield runner


def by_definition(logits: torch.Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> torch.Tensor:
    values = logits.double().tolist()
    for token in set(prompt) | set(answer):
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(answer):
        values[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    for token, bias in params.logit_bias:
        values[token] += bias
    return torch.tensor(values)


CASES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.5},
    {"logit_bias": {3: 40.0, 4: -100.0}},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3, "logit_bias": {8: 1.5}},
]


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_follow_the_changed_logits(runner: MoERunner, case: dict) -> None:
    params = SamplingParams(max_new_tokens=14, ignore_eos=True, **case)
    together = runner.generate([PROMPT, [1, 2], PROMPT], [params, SamplingParams(max_new_tokens=14), params])
    answer: list[int] = []
    for _ in range(14):
        logits = runner.logits(PROMPT + answer)[-1]
        answer.append(int(by_definition(logits, PROMPT, answer, params).argmax()))
    assert list(together[0].token_ids) == answer
    assert together[2].token_ids == together[0].token_ids


def test_a_slot_begins_anew(runner: MoERunner) -> None:
    params = SamplingParams(max_new_tokens=10, ignore_eos=True, frequency_penalty=2.0)
    first = [runner.generate(PROMPT, params).token_ids for _ in range(4)]
    assert len(set(first)) == 1


def test_of_a_row_that_lost_its_slot_the_answer_counts_on() -> None:
    penalties, params = Penalties(2, torch.device("cpu")), SamplingParams(frequency_penalty=1.0, presence_penalty=0.5)
    logits = torch.zeros(2, 6)
    penalties.begin(1, [0, 1], [2, 2, 3], 6)
    penalties.count([1], torch.tensor([3], dtype=torch.int32))
    penalties.apply(logits, torch.tensor([1]), [1], [params])
    assert torch.equal(logits[1], by_definition(torch.zeros(6), [0, 1], [2, 2, 3, 3], params).float())
    assert not logits[0].any()


def test_many_rows_are_changed_as_one_is() -> None:
    """A few at a time, here the odd ones of more than twice as many."""
    count = 2 * ROWS_AT_ONCE + 3
    penalties, logits = Penalties(count, torch.device("cpu")), torch.randn(2 * count, 50)
    rows = torch.arange(count) * 2 + 1
    params = [SamplingParams(repetition_penalty=1.1, logit_bias={slot % 50: 3.0}) for slot in range(count)]
    expected = logits.clone()
    for slot, one in enumerate(params):
        penalties.begin(slot, [slot % 50, 7], [slot % 9], 50)
        expected[rows[slot]] = by_definition(logits[rows[slot]], [slot % 50, 7], [slot % 9], one).float()
    penalties.apply(logits, rows, range(count), params)
    torch.testing.assert_close(logits, expected)


def test_bad_values_are_refused(runner: MoERunner) -> None:
    for field, value in (
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "1"),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", [(1, 1), (1, 2)]),
        ("logit_bias", 5),
        ("logit_bias", dict.fromkeys(range(1025), 0)),
        ("timeout", 0),
        ("priority", 1.5),
    ):
        with pytest.raises(RequestError, match=f"SamplingParams.{field}"):
            SamplingParams(**{field: value})
    with pytest.raises(RequestError, match="logit_bias: token 512"):
        runner.generate([1], SamplingParams(logit_bias={512: 1.0}))
