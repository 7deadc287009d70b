"""Sampling: tokens against the definition in float64: the part of the CDF that a token has holds the uniform."""

import math
from itertools import product

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from torch import Tensor

from moe_nvfp4.kernels.sample import Sampled, SamplingRows, logprobs, sample, sample_twin

NEAR = 1e-5  # of the CDF and of top_p: float32 sums of 262144 weights are closer

# temperature, top_k, top_p, min_p
GREEDY = (0.0, 0, 1.0, 0.0)
ROWS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 0.8, 0.0),
    (1.0, 64, 0.95, 0.0),
    (1.3, 1000, 0.5, 0.0),
    (1.0, 0, 0.9, 0.0),
    (0.6, 0, 0.3, 0.01),
    (2.0, 0, 1.0, 0.2),
    (0.5, 3, 1.0, 0.5),
    (1.0, 1, 1.0, 0.0),
    (100.0, 7, 1e-9, 1.0),
    (1e-30, 50, 0.99, 0.0),
    (1e30, 2**31 - 1, 0.999, 0.0),
]


def rows_of(params: list[tuple[float, int, float, float]], uniform: Tensor, device: str = "cpu") -> SamplingRows:
    temperature, top_k, top_p, min_p = (list(field) for field in zip(*params, strict=True))
    packed = torch.tensor([temperature, [0.0] * len(params), top_p, min_p, uniform.tolist()])
    packed[1] = torch.tensor(top_k, dtype=torch.int32).view(torch.float32)
    return SamplingRows.views(packed.to(device))


def logits_of(kind: str, rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits as models give them: a few high above many, or flat; and those that are hard to order."""
    x = torch.randn(rows, vocabulary)
    if kind == "peaked":
        x = x * 2.5 - 3
        few = torch.randint(0, vocabulary, (rows, 40))
        x.scatter_(1, few, torch.randn(rows, 40) * 3 + 14)
    elif kind == "tied":
        x = torch.randint(-2, 3, (rows, vocabulary)).float() * 0.5
    elif kind == "zero":
        x = torch.zeros(rows, vocabulary)
    elif kind == "excluded":
        x[torch.rand(rows, vocabulary) < 0.99] = -math.inf
        x[:, -1] = 0.0
    elif kind == "tiny":
        x = x * 1e-38
    return x.to(dtype)


def interval(
    x_V: Tensor, token: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[float, float] | None:
    """The token's part of the CDF by the definition, or None if the filters drop it."""
    x_V = x_V.double()
    order = x_V.sort(descending=True, stable=True).indices[: top_k or None]
    probs = torch.softmax((x_V[order] - x_V.max()) / temperature, dim=0)
    if top_p < 1:
        order = order[: int((probs.cumsum(0) < top_p).sum()) + 1]
    probs = torch.zeros_like(x_V).scatter_(0, order, ((x_V[order] - x_V.max()) / temperature).exp())
    probs[probs < min_p] = 0.0
    if probs[token] == 0:
        return None
    cdf = probs.cumsum(0) / probs.sum()
    return float(cdf[token] - probs[token] / probs.sum()), float(cdf[token])


def check(logits_BV: Tensor, params: list[tuple[float, int, float, float]], device: str) -> None:
    """Every token is one that the filters, moved by a rounding, keep, and its part of the CDF has the uniform."""
    uniform = torch.rand(len(params))
    uniform[::5], uniform[1::7] = 0.0, 1 - 2**-24
    logits_BV = logits_BV.to(device)
    sampled = sample(logits_BV, rows_of(params, uniform, device))
    assert sampled.token_ids.dtype == torch.int32 and sampled.peaks.dtype == torch.float32
    assert torch.equal(sampled.peaks, logits_BV.max(dim=1).values.float())
    for row, (temperature, top_k, top_p, min_p) in enumerate(params):
        token, x_V = int(sampled.token_ids[row]), logits_BV[row]
        if temperature == 0:
            assert token == int((x_V == x_V.max()).nonzero()[0])
            continue
        low, high = math.inf, -math.inf
        masses = {top_p} | {p for p in (top_p - NEAR, top_p + NEAR) if top_p < 1 and 0 < p < 1}
        fractions = {min_p, min_p * (1 - NEAR), min(min_p * (1 + NEAR), 1.0)}
        for p, m in product(masses, fractions):
            kept = interval(x_V, token, temperature, top_k, p, m)
            low, high = (low, high) if kept is None else (min(low, kept[0]), max(high, kept[1]))
        where = f"row {row}, {params[row]}, uniform {uniform[row]:.8f}, token {token}: {low:.8f} to {high:.8f}"
        assert low - NEAR <= uniform[row] <= high + NEAR, where


KINDS = ["peaked", "flat", "tied", "zero", "excluded", "tiny"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1, 50, 3000])
def test_twin(vocabulary: int, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(logits_of(kind, len(ROWS) + 1, vocabulary, dtype), [*ROWS, GREEDY], "cpu")


def test_twin_without_rows() -> None:
    sampled = sample(torch.empty(0, 10), SamplingRows.views(torch.empty(5, 0)))
    assert sampled.token_ids.shape == sampled.peaks.shape == (0,)


def test_twin_draws_what_the_probabilities_say() -> None:
    """Uniforms on a grid draw each token as often as its probability."""
    x = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    count = 1000
    uniform = (torch.arange(count) + 0.5) / count
    for params, expected in (
        ((1.0, 0, 1.0, 0.0), [100, 400, 200, 300]),
        ((1.0, 3, 1.0, 0.0), [0, 444, 222, 333]),
        ((1.0, 0, 0.69, 0.0), [0, 571, 0, 429]),
        ((1.0, 0, 1.0, 0.7), [0, 571, 0, 429]),
        ((0.5, 3, 0.5, 0.0), [0, 1000, 0, 0]),
    ):
        tokens = sample_twin(x.expand(count, 4), rows_of([params] * count, uniform)).token_ids
        assert (torch.bincount(tokens, minlength=4) - torch.tensor(expected)).abs().max() <= 1


@pytest.mark.parametrize("k", [0, 1, 5, 100, 5000])
def test_logprobs(k: int) -> None:
    for kind in KINDS:
        x = logits_of(kind, 3, 2000, torch.bfloat16)
        tokens = torch.tensor([0, 1999, 7], dtype=torch.int32)
        expected = torch.log_softmax(x.double(), dim=1)
        chosen, ids, values = logprobs(x, tokens, k)
        assert torch.allclose(chosen.double(), expected.gather(1, tokens[:, None].long())[:, 0], atol=1e-5)
        order = x.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(ids, order)
        assert torch.allclose(values.double(), expected.gather(1, order), atol=1e-5)


BROKEN = [[0.0, math.nan], [math.inf, math.nan], [math.inf, 0.0], [-math.inf, -math.inf], [-math.nan, -math.inf]]


def check_broken(device: str) -> None:
    x = torch.tensor(BROKEN)
    for params in (GREEDY, ROWS[0], ROWS[1]):
        sampled = sample(x.to(device), rows_of([params] * len(x), torch.rand(len(x)), device))
        assert torch.equal(sampled.peaks.cpu().nan_to_num(5.0, 6.0, 7.0), x.max(dim=1).values.nan_to_num(5.0, 6.0, 7.0))
        assert ((sampled.token_ids >= 0) & (sampled.token_ids < 2)).all()


def test_broken_logits() -> None:
    check_broken("cpu")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("vocabulary", "kind"),  # more tokens than are held in registers take 5 s and more
    [*product((1, 200), KINDS), *product((12000,), ("peaked", "flat", "tied"))],
)
def test_interpreted(vocabulary: int, kind: str) -> None:
    check(logits_of(kind, len(ROWS) + 1, vocabulary), [*ROWS, GREEDY], "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_bfloat16_and_broken_logits() -> None:
    check(logits_of("peaked", 20, 999, torch.bfloat16), [ROWS[i % len(ROWS)] for i in range(20)], "cpu")
    check_broken("cpu")


def many(rows: int) -> list[tuple[float, int, float, float]]:
    return [([*ROWS, GREEDY])[i % (len(ROWS) + 1)] for i in range(rows)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, vocabulary", [(13, 248320), (26, 262144), (13, 50000), (26, 4097), (26, 3)])
def test_gpu(rows: int, vocabulary: int, kind: str, dtype: torch.dtype) -> None:
    check(logits_of(kind, rows, vocabulary, dtype), many(rows), "cuda")


@pytest.mark.gpu
def test_broken_logits_on_a_gpu() -> None:
    check_broken("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_a_row_is_alone(kind: str) -> None:
    """The same token whatever else is in the batch, and the same again."""
    params, uniform = many(64), torch.rand(64)
    x = logits_of(kind, 64, 151936).cuda()
    rows = rows_of(params, uniform, "cuda")
    together = sample(x, rows)
    assert torch.equal(together.token_ids, sample(x, rows).token_ids)
    for row in range(64):
        alone = sample(x[row : row + 1], SamplingRows(*(field[row : row + 1].clone() for field in rows)))
        assert int(alone.token_ids) == int(together.token_ids[row])


@pytest.mark.gpu
def test_a_graph_reads_its_rows_when_it_runs() -> None:
    x = logits_of("peaked", 8, 262144).cuda()
    packed = torch.zeros(5, 8, device="cuda")
    rows = SamplingRows.views(packed)
    sample(x, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled: Sampled = sample(x, rows)
    for params in (GREEDY, ROWS[1], ROWS[4]):
        chosen = rows_of([params] * 8, torch.rand(8), "cuda")
        expected = sample(x, chosen).token_ids
        for field, values in zip(rows, chosen, strict=True):
            field.copy_(values)
        graph.replay()
        assert torch.equal(sampled.token_ids, expected)
