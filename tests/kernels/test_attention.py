"""Causal attention over a cache against loops in float64."""

import pytest
import torch

from moe_nvfp4.kernels.attention import attention
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error


def restated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    rows, heads, _ = q.shape
    cached, groups = k.shape[:2]
    out = torch.empty(rows, heads, v.shape[2], dtype=torch.float64)
    for t in range(rows):
        seen = cached - rows + t + 1
        for head in range(heads):
            group = head // (heads // groups)
            scores = torch.stack([q[t, head].double() @ k[s, group].double() * scale for s in range(seen)])
            out[t, head] = torch.softmax(scores, 0) @ v[:seen, group].double()
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("rows", "cached"), [(1, 1), (1, 9), (5, 5), (4, 11)])
def test_against_loops(rows: int, cached: int, heads: int, groups: int, dtype: str) -> None:
    kind = getattr(torch, dtype)
    q = torch.randn(rows, heads, 16).to(kind)
    k, v = torch.randn(cached, groups, 16).to(kind), torch.randn(cached, groups, 16).to(kind)
    found = attention(q, k, v, 0.3)
    assert (found.dtype, found.shape) == (kind, q.shape)
    assert not found.isnan().any()
    assert relative_error(found, restated(q, k, v, 0.3)) < TOLERANCE[dtype]


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [11, 1], [4, 4, 4]])
def test_chunks_equal_the_whole(cuts: list[int]) -> None:
    q, k, v = torch.randn(12, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    whole, parts, begin = attention(q, k, v, 0.25), [], 0
    for size in cuts:
        end = begin + size
        parts.append(attention(q[begin:end], k[:end], v[:end], 0.25))
        begin = end
    assert relative_error(torch.cat(parts), whole) < TOLERANCE["float32"]


def test_the_future_is_not_seen() -> None:
    q, k, v = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    before = attention(q, k, v, 0.3)
    k[4:], v[4:] = 1e3, 1e3
    assert torch.equal(attention(q, k, v, 0.3)[:4], before[:4])
