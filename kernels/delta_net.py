"""Gated delta rule with its convolution, gates and gated norm: the linear attention of Qwen3.5 and Qwen3.6.

    y = silu(sum_j w[:, K - 1 - j] mixed[t - j])                      causal, depthwise; y is q | k | v
    q, k = q / |q| / sqrt(DK), k / |k|;  beta = sigmoid(b);  g = exp(decay softplus(a + step))
    S = g S + k (beta (v - (g S)^T k))^T;  o = S^T q                  S [DK, DV] of each value head
    out = o / rms(o) norm silu(z)

Value head h uses the query and key head h HK // HV. Everything is float32 until the output is rounded, once; the
tensor cores of prefill take float16 operands (see delta_chunks.py). This file chooses: sequences with one row take
one fused launch (delta_step.py), the others four (delta_conv.py, delta_chunks.py).

Letters: T rows, C = 2 HK DK + HV DV channels, K taps of the convolution, H value heads.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_nvfp4.kernels.delta_chunks import delta_chunks
from moe_nvfp4.kernels.delta_state import DeltaState
from moe_nvfp4.kernels.delta_step import delta_step
from moe_nvfp4.kernels.rows import CHUNK, Rows, chunk_places
from moe_nvfp4.kernels.sort_pairs import use_twin

_NORM_EPSILON = 1e-6  # of the norms of q and k; the checkpoint's own is for the output


class DeltaWeights(NamedTuple):
    conv: Tensor  # [C, K]
    decay: Tensor  # float32 [HV]: -exp(A_log)
    step: Tensor  # float32 [HV]: dt_bias
    norm: Tensor  # [DV], plain: not 1 + w


class DeltaInputs(NamedTuple):
    """Projections of the layer's input; strides between rows are free."""

    mixed_TC: Tensor
    z_TV: Tensor
    b_TH: Tensor
    a_TH: Tensor


def delta_net(
    mixed_TC: Tensor,
    z_TV: Tensor,
    b_TH: Tensor,
    a_TH: Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    rows: Rows,
    eps: float,
) -> Tensor:
    """[T, HV DV] in the dtype of mixed; the states of the rows' sequences are updated in place, and `rows.lines` too.

    A sequence whose first row here is position 0 starts from zero. The launch before this one in the stream must not
    write the state or the weights: on sm_90 they are read before it has ended.
    """
    inputs = DeltaInputs(mixed_TC, z_TV, b_TH, a_TH)
    if use_twin(mixed_TC) or (mixed_TC.is_cuda and mixed_TC.dtype != torch.bfloat16):
        return delta_net_twin(inputs, weights, state, rows, eps)
    return delta_net_kernels(inputs, weights, state, rows, eps)


def delta_net_kernels(inputs: DeltaInputs, weights: DeltaWeights, state: DeltaState, rows: Rows, eps: float) -> Tensor:
    """Takes bfloat16, and float32 for tests: products are of float16, and errors 1e-4 to 1e-3."""
    heads, mixed_TC = state.heads, inputs.mixed_TC
    assert all(size & (size - 1) == 0 and size >= 16 for size in (heads.DK, heads.DV)), heads
    assert all(x.stride(1) == 1 for x in inputs) and all(x.is_contiguous() for x in (*weights, *state))
    out_TV = mixed_TC.new_empty(mixed_TC.shape[0], heads.HV * heads.DV)
    if not mixed_TC.is_cuda:  # Gluon has no interpreter
        chunks = torch.tensor(chunk_places(rows.starts.tolist()), dtype=torch.int32)
        rows = rows._replace(decodes=0, chunks=chunks)
    if rows.decodes:
        delta_step(inputs, weights, state, rows, out_TV, eps)
    if rows.decodes < rows.slots.numel():
        delta_chunks(inputs, weights, state, rows.prefills(), out_TV, eps)
    return out_TV


def delta_net_twin(inputs: DeltaInputs, weights: DeltaWeights, state: DeltaState, rows: Rows, eps: float) -> Tensor:
    """In float32, or float64 if mixed is: a sequence after the other, 64 rows at a time. It writes every state."""
    heads, mixed_TC = state.heads, inputs.mixed_TC
    dtype = torch.promote_types(mixed_TC.dtype, torch.float32)
    z_THV = inputs.z_TV.to(dtype).view(-1, heads.HV, heads.DV)
    beta_TH = inputs.b_TH.to(dtype).sigmoid()
    decay_TH = weights.decay.to(dtype) * F.softplus(inputs.a_TH.to(dtype) + weights.step.to(dtype))
    out_THV = torch.empty_like(z_THV)
    for slot, line, (begin, end), length in zip(
        rows.slots.tolist(), rows.lines.tolist(), pairwise(rows.starts.tolist()), rows.lengths.tolist(), strict=True
    ):
        if begin == end:
            continue
        count = end - begin
        before, mixed_NC = length - count, mixed_TC[begin:end]
        q, k, v = _convolve(mixed_NC, weights.conv.to(dtype), state, slot, before)
        memory = state.memory(slot, before).to(dtype)
        for first in range(0, count, CHUNK):
            if line >= 0 and first + CHUNK >= count:
                _keep(state, line, mixed_NC[:first], before, memory)
            here = slice(first, min(first + CHUNK, count))
            there = slice(begin + here.start, begin + here.stop)
            o_HTV, memory = _chunk(q[:, here], k[:, here], v[:, here], decay_TH[there].T, beta_TH[there].T, memory)
            out_THV[there] = o_HTV.transpose(0, 1)
        _keep(state, slot, mixed_NC, before, memory)
    normed = F.rms_norm(out_THV, (heads.DV,), weights.norm.to(dtype), eps) * F.silu(z_THV)
    return normed.flatten(1).to(mixed_TC.dtype)


def _convolve(
    mixed_NC: Tensor, conv_CK: Tensor, state: DeltaState, slot: int, before: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [HV, N, D] of N rows that follow `before` others; q and k normalised, a copy for each value head."""
    heads, taps, count = state.heads, conv_CK.shape[1], mixed_NC.shape[0]
    earlier = torch.arange(before - taps + 1, before, device=mixed_NC.device)
    past = torch.where((earlier >= 0)[:, None], state.conv[slot, earlier % taps], 0.0)
    padded = torch.cat((past, mixed_NC)).to(conv_CK.dtype)
    y_NC = F.silu(sum((padded[tap : tap + count] * conv_CK[:, tap] for tap in range(taps)), start=padded.new_zeros(())))
    q, k, v = y_NC.split((heads.HK * heads.DK, heads.HK * heads.DK, heads.HV * heads.DV), dim=1)
    q, k = (x.view(count, heads.HK, heads.DK).repeat_interleave(heads.HV // heads.HK, dim=1) for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + _NORM_EPSILON).rsqrt() for x in (q, k))
    q, k, v = (x.transpose(0, 1) for x in (q * heads.DK**-0.5, k, v.view(count, heads.HV, heads.DV)))
    return q, k, v


def _keep(state: DeltaState, line: int, mixed_NC: Tensor, before: int, memory: Tensor) -> None:
    """What is there after N rows that follow `before` others."""
    count, taps = mixed_NC.shape[0], state.conv.shape[1]
    last = torch.arange(max(0, count - taps), count, device=mixed_NC.device)
    state.conv[line, (before + last) % taps] = mixed_NC[last]
    state.recurrent[line] = memory.to(state.recurrent.dtype)
    state.written[line] = before + count


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay_HN: Tensor, beta_HN: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """o [H, N, DV], and the memory after N rows. What the rows add to it solves a triangular system."""
    total = decay_HN.cumsum(-1)[..., None]
    fade = (total - total.mT).tril().exp().tril()
    system = (k @ k.mT * fade).tril(-1) * beta_HN[..., None]
    unknown = beta_HN[..., None] * (v - total.exp() * (k @ memory))
    added = torch.linalg.solve_triangular(system, unknown, upper=False, unitriangular=True)
    o = total.exp() * (q @ memory) + (q @ k.mT * fade) @ added
    return o, total[:, -1:].exp() * memory + (k * fade[:, -1, :, None]).mT @ added
