import hashlib
import math
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_nvfp4.errors import RequestError
from moe_nvfp4.kernels.sample import logprobs, sample
from moe_nvfp4.sampling import MAX_LOGPROBS, Sampler, SamplingParams, check_peak, sampling_rows

BAD: list[tuple[str, Any]] = [
    *[("max_new_tokens", value) for value in (0, -1, 1.0, "1", None, True, 2**63)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, -math.inf, "1", None, True, 10**400)],
    *[("top_k", value) for value in (-1, 1.5, None, False)],
    *[("top_p", value) for value in (0, 0.0, -0.5, 1.0001, math.nan, "x", True)],
    *[("min_p", value) for value in (-0.01, 1.01, math.nan, math.inf, None)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.0, "7", True)],
    *[("stop", value) for value in ("", ["a", ""], ["a"] * 17, [1], b"x", 5, {"a"})],
    *[("stop_token_ids", value) for value in (5, None, [-1], [True], ["1"], [1.0])],
    *[("ignore_eos", value) for value in (1, "yes", None)],
    *[("n", value) for value in (0, -1, 129, 1.0, True, None)],
    *[("logprobs", value) for value in (-1, MAX_LOGPROBS + 1, 1.0, True)],
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^SamplingParams\.{field}: got .*; expected "):
        SamplingParams(**{field: value})


def test_message_is_short_and_exact() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "SamplingParams.top_p: got 1.5; expected a number in (0, 1] (1 is off)"
    with pytest.raises(RequestError) as caught:
        SamplingParams(stop=["x" * 10**6, ""])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_normalised() -> None:
    fields: dict[str, Any] = {
        "stop": "end",
        "stop_token_ids": [np.int64(3)],
        "temperature": 1,
        "n": np.int32(2),
    }
    params = SamplingParams(**fields)
    assert params == SamplingParams(stop=("end",), stop_token_ids=(3,), temperature=1.0, n=2)
    assert type(params.temperature) is float and type(params.n) is int and type(params.stop_token_ids[0]) is int
    hash(params)
    lists: dict[str, Any] = {"stop": ["a", "b"]}
    assert SamplingParams(**lists).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]


def test_limits_are_accepted() -> None:
    SamplingParams(seed=2**63 - 1, n=128, logprobs=MAX_LOGPROBS, top_p=5e-324, min_p=1, stop=("a",) * 16)
    SamplingParams(seed=-(2**63), temperature=sys.float_info.max, top_k=2**62)


def next_token(sampler: Sampler, logits: torch.Tensor) -> int:
    token_ids, peaks = sample(logits[None], sampling_rows([sampler], logits.device))
    check_peak(float(peaks))
    return int(token_ids)


def draw(logits: torch.Tensor, count: int, index: int = 0, **fields: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 0, **fields}), index)
    return [next_token(sampler, logits) for _ in range(count)]


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log().float()


def chi_square(tokens: list[int], probs: torch.Tensor) -> float:
    counts = Counter(tokens)
    assert set(counts) <= {token for token, p in enumerate(probs.tolist()) if p > 0}
    expected = {token: p * len(tokens) for token, p in enumerate(probs.tolist()) if p > 0}
    return float(sum((counts[token] - e) ** 2 / e for token, e in expected.items()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution(temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    logits[4] = -math.inf
    tokens = draw(logits, 4000, temperature=temperature, seed=5)
    # 10 degrees of freedom: 29.6 is exceeded once in 1000 seeds, and this seed is fixed.
    assert chi_square(tokens, torch.softmax(logits / temperature, 0)) < 29.6


def test_filtered_distribution_is_renormalised() -> None:
    tokens = draw(logits_of(0.1, 0.4, 0.2, 0.3), 4000, top_k=2)
    assert chi_square(tokens, torch.tensor([0, 4 / 7, 0, 3 / 7])) < 10.8


def kept(logits: torch.Tensor, **fields: Any) -> set[int]:
    return set(draw(logits, 600, **fields))


def test_top_k() -> None:
    logits = logits_of(0.1, 0.3, 0.3, 0.3)
    assert kept(logits, top_k=1) == {1}
    assert kept(logits, top_k=2) == {1, 2}  # equal logits: the lowest ids stay
    assert kept(logits, top_k=3) == {1, 2, 3}
    assert kept(logits, top_k=100) == {0, 1, 2, 3}


def test_top_p() -> None:
    logits = logits_of(0.125, 0.5, 0.25, 0.125)
    assert kept(logits, top_p=1e-9) == {1}
    assert kept(logits, top_p=0.49) == {1}
    assert kept(logits, top_p=0.51) == {1, 2}
    assert kept(logits, top_p=0.76) == {0, 1, 2}
    assert kept(logits, top_p=0.999) == {0, 1, 2, 3}


def test_min_p() -> None:
    logits = logits_of(0.1, 0.6, 0.3)
    assert kept(logits, min_p=0.51) == {1}
    assert kept(logits, min_p=0.49) == {1, 2}
    assert kept(logits, min_p=0.16) == {0, 1, 2}
    assert kept(torch.zeros(3), min_p=1.0) == {0, 1, 2}


def test_order_of_filters() -> None:
    logits = logits_of(0.4, 0.35, 0.15, 0.1)
    # After top_k=2 the mass of token 0 is 0.53, so it alone reaches 0.5; without top_k two are needed.
    assert kept(logits, top_k=2, top_p=0.5) == {0}
    assert kept(logits, top_p=0.5) == {0, 1}
    # Temperature comes first: at 0.5 the masses are 0.51, 0.39, 0.07, 0.03.
    assert kept(logits, temperature=0.5, top_p=0.5) == {0}


def test_filters_that_keep_everything_change_nothing() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert draw(logits, 50) == draw(logits, 50, top_k=50) == draw(logits, 50, top_p=1 - 1e-16 * 2, min_p=1e-300)


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    temperature=st.sampled_from([5e-324, 1e-30, 0.7, 1.0, 1e300]),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@example(
    logits=[-1.0, 0.0], temperature=1e300, top_k=1, top_p=1.0, min_p=0.0, seed=0
)  # equal probabilities, unequal logits
@settings(max_examples=150, deadline=None)
def test_draws_stay_within_the_filters(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    row = torch.tensor(logits)
    token_id = next_token(Sampler(params), row)
    shifted = (row - row.max()).tolist()  # a logit within rounding of another, seen from the peak, is equal to it
    ranking = sorted(range(len(logits)), key=lambda token: (-shifted[token], token))
    assert token_id in ranking[: top_k or len(logits)]
    probs = torch.softmax((row.double() - row.max().double()) / temperature, 0)
    assert probs[token_id] > 0 and probs[token_id] >= min_p * probs.max() * (1 - 1e-9)


def test_greedy() -> None:
    assert draw(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3, temperature=0) == [1, 1, 1]
    assert draw(torch.tensor([-math.inf, -5.0]), 1, temperature=0) == [1]
    big = torch.zeros(200_000)
    assert draw(big, 1, temperature=0) == [0]


def test_extreme_logits() -> None:
    assert kept(torch.tensor([3e38, -3e38]), temperature=1e-300) == {0}
    assert kept(torch.tensor([-math.inf, 0.0, -math.inf])) == {1}
    assert kept(torch.tensor([7.0])) == {0}
    assert kept(torch.tensor([0.0, -math.inf, 0.0]), top_k=3, top_p=0.9999) == {0, 2}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_ends_of_the_unit_interval(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random.Random, "random", lambda self: u)
    logits = torch.tensor([-math.inf, 0.0, 1.0, -2.0, -math.inf])
    assert draw(logits, 1) == [1 if u == 0 else 3]


def test_seeds() -> None:
    logits = torch.zeros(1000)
    assert draw(logits, 20, seed=3) == draw(logits, 20, seed=3)
    streams = {tuple(draw(logits, 5, seed=seed)) for seed in (-2, -1, 0, 1, 2, 2**63 - 1)}
    assert len(streams) == 6
    assert draw(logits, 5, seed=None) != draw(logits, 5, seed=None)


def test_seed_is_stable_across_versions() -> None:
    stream = random.Random(int.from_bytes(hashlib.sha256(b"3:0").digest(), "big"))
    assert draw(torch.zeros(1000), 20, seed=3) == [int(stream.random() * 1000) for _ in range(20)]


def test_one_random_number_per_token() -> None:
    sampler, other = (Sampler(SamplingParams(temperature=1.0, seed=9)) for _ in range(2))
    rows = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (3, 50, 7, 900)]
    for row in rows:
        next_token(sampler, row)
    other.skip(len(rows))
    assert sampler.uniform() == other.uniform()


def test_choices_have_their_own_streams() -> None:
    logits = torch.zeros(1000)
    choices = [tuple(draw(logits, 5, index=index, seed=7, n=4)) for index in range(4)]
    assert len(set(choices)) == 4
    assert choices[0] == tuple(draw(logits, 5, seed=7))
    assert choices[1] != tuple(draw(logits, 5, seed=8))


def test_rows_are_those_of_each_sequence_alone() -> None:
    """A batch of unlike sequences, one row of which nobody reads."""
    fields: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 2**62, "seed": 1},
        {"temperature": 1e300, "top_k": 5, "top_p": 5e-324, "seed": 2},
        {"temperature": 5e-324, "min_p": 0.3, "seed": 3},
        {"temperature": 1.5, "top_p": 0.7, "seed": 4},
    ]
    samplers, alone = ([Sampler(SamplingParams(**one)) for one in fields] for _ in range(2))
    for _ in range(20):
        logits = torch.randn(6, 100)
        rows = sampling_rows([*samplers[:3], None, *samplers[3:]], logits.device)
        token_ids = sample(logits, rows).token_ids.tolist()
        del token_ids[3]
        rest = [logits[row] for row in (0, 1, 2, 4, 5)]
        assert token_ids == [next_token(one, x) for one, x in zip(alone, rest, strict=True)]


def test_logprobs_are_of_the_logits_as_given() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=0.3, top_k=3, seed=1)
    token_ids, _ = sample(logits[None], sampling_rows([Sampler(params)], logits.device))
    (chosen,), (ids,), (values,) = logprobs(logits[None], token_ids, 5)
    expected = torch.log_softmax(logits, 0)
    assert float(chosen) == pytest.approx(float(expected[token_ids]), abs=1e-5)
    assert ids.tolist() == expected.topk(5).indices.tolist()
    assert values.tolist() == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "found"),
    [
        ([0.0, math.nan], "NaN"),
        ([math.inf, math.nan], "NaN"),
        ([0.0, math.inf], r"\+inf"),
        ([-math.inf], "-inf for"),
    ],
)
def test_broken_logits(row: list[float], found: str, temperature: float) -> None:
    with pytest.raises(FloatingPointError, match=f"logits: got {found}"):
        draw(torch.tensor(row), 1, temperature=temperature)


def test_imports_no_transformers() -> None:
    modules = "moe_nvfp4.sampling, moe_nvfp4.tokenizer, moe_nvfp4.detokenize"
    code = f"import sys, {modules}; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
