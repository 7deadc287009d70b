"""Rotary position embedding, NeoX style: pairs (i, i + D/2) of a head rotate by position * frequency_i."""

import torch


def rope_table(
    positions_T: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D/2], computed in float32 and rounded to the dtype of the activations."""
    angles = positions_T.float()[:, None] * inv_freq[None, :]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rope(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates every head of every row."""
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
