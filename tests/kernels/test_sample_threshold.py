"""The threshold against a sort: few blocks in registers, or passes over many. Blocks are small, to have many."""

import pytest
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED, run_interpreted
from torch import Tensor

from moe_nvfp4.kernels.sample_threshold import find_threshold, key_of, value_of, weights_of

HELD = 16  # blocks
BLOCK = 8


@triton.jit
def threshold_of_a_row(
    logits_ptr, scratch_ptr, out_ptr, V, blocks, target, COUNT: tl.constexpr,
    N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    ids = tl.arange(0, BP)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    tops = tl.max(x, 1)
    peak = tl.max(tops, 0)
    mass = tl.sum(weights_of(x, peak, 1.4426950408889634), 1)
    total = tl.sum(mass, 0)
    goal = target * total
    if COUNT:
        goal = target
    low, ties, weight = find_threshold(
        logits_ptr, key_of(tops, SHIFT), mass, peak, 1.4426950408889634, goal, total - goal,
        key_of(peak - 80.0, SHIFT), 0, scratch_ptr, V, blocks, N, BP, HELD, SHIFT, COUNT,
    )  # fmt: skip
    tl.store(out_ptr, value_of(low, SHIFT))
    tl.store(out_ptr + 1, ties.to(tl.float32))
    tl.store(out_ptr + 2, weight / total)


def row_of(kind: str, vocabulary: int) -> Tensor:
    x = torch.randn(vocabulary)
    if kind == "tied":
        x = torch.randint(-3, 4, (vocabulary,)) * 0.5
    elif kind == "sorted":
        x = x.sort().values  # a sample is unlike the rest where it matters
    elif kind == "two":
        x = torch.where(torch.rand(vocabulary) < 0.5, 1e-30, -3.0)
    elif kind == "peak":
        x[vocabulary // 2] = 12.0
    return x.float()


def check(kind: str, vocabulary: int, dtype: torch.dtype, target: float, count: bool, device: str) -> None:
    x = row_of(kind, vocabulary).to(dtype)
    blocks = triton.cdiv(vocabulary, BLOCK)
    out, scratch = torch.empty(3, device=device), torch.empty(3, blocks, dtype=torch.int32, device=device)
    threshold_of_a_row[(1,)](
        x.to(device), scratch, out, vocabulary, blocks, target,
        COUNT=count, N=BLOCK, BP=triton.next_power_of_2(blocks), HELD=HELD,
        SHIFT=16 if dtype == torch.bfloat16 else 0,
    )  # fmt: skip
    value, ties, share = out.cpu().tolist()
    ranked = x.double().sort(descending=True).values
    cdf = torch.softmax(ranked, 0).cumsum(0)
    kept = int((x > value).sum()) + int(ties)
    assert 1 <= ties <= int((x == value).sum())
    assert share == pytest.approx(float(cdf[kept - 1]), abs=1e-5)
    if count:
        assert kept == target
    else:
        assert share >= target - 1e-5 and (kept == 1 or cdf[kept - 2] < target + 1e-5)


KINDS = ["flat", "tied", "sorted", "two", "peak"]


def check_many(kind: str, vocabulary: int, dtype: torch.dtype, device: str, every: int = 1) -> None:
    for k in (1, 61, vocabulary // 3)[::every]:
        check(kind, vocabulary, dtype, float(k), True, device)
    for p in (0.01, 0.5, 0.99)[::every]:
        check(kind, vocabulary, dtype, p, False, device)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("flat", torch.bfloat16), ("tied", torch.bfloat16)]
)
def test_interpreted(kind: str, dtype: torch.dtype) -> None:
    check_many(kind, 600, dtype, "cpu", every=1 if kind == "flat" else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu(kind: str, dtype: torch.dtype) -> None:
    for vocabulary in (150, 5000, 16384):
        check_many(kind, vocabulary, dtype, "cuda")
