"""Causal attention of a step's rows over pages: the one place that chooses a kernel, and the torch twin of both.

Sequences with one row go through decode_attention.py, the others through prefill_attention.py. The keys and values of
the step are in the pages before it.

Letters: T rows, S positions, N heads, G key-value heads, D head size.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_nvfp4.kernels.decode_attention import decode_attention
from moe_nvfp4.kernels.paged_kv import PagedKV, gather_twin
from moe_nvfp4.kernels.prefill_attention import prefill_attention
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sizes import next_power_of_2
from moe_nvfp4.kernels.sort_pairs import use_twin


def paged_attention(
    q_TND: Tensor, kv: PagedKV, rows: Rows, scale: float, *, window: int = 0, gate_TND: Tensor | None = None
) -> Tensor:
    """[T, N, D]: each row over the positions up to its own, or the last `window` of them; times sigmoid(gate).

    Softmax in float32. Heads share G key-value heads in equal groups. q and gate may be strided, D apart from 1 not.
    """
    if not _has_kernels(q_TND, kv):
        return paged_attention_twin(q_TND, kv, rows, scale, window=window, gate_TND=gate_TND)
    out_TND = q_TND.new_empty(q_TND.shape)
    if rows.decodes:
        decode_attention(q_TND, kv, rows, scale, window, gate_TND, out_TND)
    if rows.slots.numel() > rows.decodes:
        prefill_attention(q_TND, kv, rows, scale, window, gate_TND, out_TND)
    return out_TND


def _has_kernels(q_TND: Tensor, kv: PagedKV) -> bool:
    """Kernels take bfloat16, and heads and pages of a power of two; Triton's interpreter runs them for tests."""
    sizes = (q_TND.shape[-1], kv.page)
    return (
        not use_twin(q_TND)
        and q_TND.dtype == torch.bfloat16
        and all(size == next_power_of_2(size) for size in sizes)
        and sizes[0] >= 16
    )


def paged_attention_twin(
    q_TND: Tensor, kv: PagedKV, rows: Rows, scale: float, *, window: int = 0, gate_TND: Tensor | None = None
) -> Tensor:
    """In float32, or float64 if q is; rounded once."""
    dtype = torch.promote_types(q_TND.dtype, torch.float32)
    out_TND = torch.zeros(q_TND.shape, dtype=dtype, device=q_TND.device)
    pieces = zip(rows.slots.tolist(), rows.lengths.tolist(), pairwise(rows.starts.tolist()), strict=True)
    for slot, length, (begin, end) in pieces:
        own = torch.arange(length - (end - begin), length, device=q_TND.device)[:, None]
        first = max(0, length - (end - begin) - window + 1) if window else 0
        at = torch.arange(first, length, device=q_TND.device)
        mask = at <= own
        if window:
            mask &= own - at < window
        k_SGD, v_SGD = gather_twin(kv, slot, first, length, dtype)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TND[begin:end].to(dtype), k_SGD, v_SGD))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        out_TND[begin:end] = heads[0].transpose(0, 1)
    if gate_TND is not None:
        out_TND *= gate_TND.to(dtype).sigmoid()
    return out_TND.to(q_TND.dtype)
