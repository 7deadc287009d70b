"""Causal attention of new rows over a sequence's cached keys and values.

Letters: T rows, S positions cached, N heads, G key-value heads, D head size.
"""

import torch
from torch.nn import functional as F


def attention(q_TND: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float) -> torch.Tensor:
    """The T rows are the last of the S positions. Heads share G key-value heads in equal groups."""
    rows, cached = q_TND.shape[0], k_SGD.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_SGD, v_SGD))
    mask = None
    if rows > 1:
        mask = torch.ones(rows, cached, dtype=torch.bool, device=q.device).tril(cached - rows)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
