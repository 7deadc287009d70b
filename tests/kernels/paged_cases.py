"""Pages, rows and the float64 reference that the tests of all attention kernels share."""

import torch
from torch import Tensor

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, encode_e4m3, relative_error
from moe_nvfp4.kernels.paged_attention import paged_attention
from moe_nvfp4.kernels.paged_kv import PagedKV, gather_twin
from moe_nvfp4.kernels.rows import Rows

Shape = tuple[int, int, int, int, int]  # heads, groups, head size, page, window
Pieces = list[tuple[int, int]]  # (tokens before the step, rows of the step) of each sequence

MIXED: Pieces = [(0, 1), (40, 1), (79, 1), (0, 33), (25, 2), (5, 70)]
SMALL: list[Shape] = [(4, 2, 32, 16, 0), (6, 2, 16, 16, 0), (2, 2, 64, 32, 20), (8, 1, 16, 64, 33), (3, 1, 32, 16, 1)]
# Qwen3.6, a window layer and a global layer of Gemma-4, Qwen3, and 64 / 4 heads.
LARGE: list[Shape] = [(16, 2, 256, 16, 0), (16, 8, 256, 32, 1024), (16, 2, 512, 64, 0), (32, 4, 128, 16, 0)]
LARGE += [(64, 4, 64, 16, 0)]


def pages(
    shape: tuple[int, int, int], slots: int, tokens: int, dtype: torch.dtype, device: str, fp8: bool = False
) -> PagedKV:
    """Pages in random order; what no position reaches is NaN."""
    page, groups, head = shape
    logical = -(-tokens // page)
    table = torch.randperm(slots * logical, dtype=torch.int32).view(slots, logical)
    full = (slots * logical, page, groups, head)
    keys, values = torch.randn(full, dtype=torch.float32), torch.randn(full, dtype=torch.float32)
    if fp8:
        return PagedKV(encode_e4m3(keys).to(device), encode_e4m3(values).to(device), table.to(device), 0.75, 1.5)
    return PagedKV(keys.to(dtype).to(device), values.to(dtype).to(device), table.to(device))


def spoil(kv: PagedKV, rows: Rows) -> PagedKV:
    """NaN wherever no sequence of the step has a position."""
    reached = torch.zeros(kv.keys.shape[:2], dtype=torch.bool, device=kv.keys.device)
    for slot, length in zip(rows.slots.tolist(), rows.lengths.tolist(), strict=True):
        at = torch.arange(length, device=kv.keys.device)
        reached[kv.table[slot, at // kv.page].long(), at % kv.page] = True
    nan = 0x7F if kv.is_fp8 else float("nan")
    return kv._replace(keys=_fill(kv.keys, ~reached, nan), values=_fill(kv.values, ~reached, nan))


def _fill(pages: Tensor, where: Tensor, value: float) -> Tensor:
    pages = pages.clone()
    pages[where] = value
    return pages


def rows_of(pieces: Pieces, device: str) -> Rows:
    slots = torch.randperm(len(pieces)).tolist()
    return Rows.of([(slot, before, count) for slot, (before, count) in zip(slots, pieces, strict=True)], device)


def reference(q: Tensor, kv: PagedKV, rows: Rows, scale: float, window: int, gate: Tensor | None) -> Tensor:
    """Row by row, in float64."""
    outputs = []
    for row in range(q.shape[0]):
        position, slot = int(rows.positions[row]), int(rows.row_slots[row])
        first = max(0, position - window + 1) if window else 0
        keys, values = (
            x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
            for x in gather_twin(kv, slot, first, position + 1, torch.float64)
        )
        weights = torch.einsum("nd,snd->ns", q[row].double(), keys).mul(scale).softmax(dim=1)
        outputs.append(torch.einsum("ns,snd->nd", weights, values))
    out = torch.stack(outputs)
    return out if gate is None else out * gate.double().sigmoid()


def check(
    pieces: Pieces,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    fp8: bool = False,
    gated: bool = False,
) -> None:
    heads, groups, head, page, window = shape
    rows = rows_of(pieces, device)
    longest = max(before + count for before, count in pieces)
    kv = spoil(pages((page, groups, head), len(pieces), longest, dtype, device, fp8), rows)
    count = int(rows.starts[-1])
    # As a projection leaves them: each head's q, then its gate.
    both = torch.randn(count, heads, 2 * head, device=device).to(dtype)
    q, gate = both[..., :head], both[..., head:] if gated else None
    out = paged_attention(q, kv, rows, head**-0.5, window=window, gate_TND=gate)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert out.is_contiguous()
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    assert relative_error(out, reference(q, kv, rows, head**-0.5, window, gate)) < TOLERANCE[name]
