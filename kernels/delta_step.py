"""One token of each sequence through the gated delta rule, in one launch: a program for each sequence and value head.

The state [DK, DV] of the head stays in registers between its one read and its one write. A warp has all DK rows of
its columns, so sums over DK need no barrier. Since (g S + k d^T)^T q = g S^T q + (k . q) d, both products with S are
taken in the same pass, before d is known. On an H200, 32 heads of 128 x 128: 3.1 µs for one sequence, 75 for 64, of
which reading and writing the state at 4.5 TB/s would be 60; plain Triton, whose sums cross warps, took 5.0 and 91.

On sm_90 and later the state, the ring of earlier inputs and the weights may be read before the launch before this one
has ended, so that launch must not write them. Nobody reads the cell of the ring that is written, so the programs
that share a key head need no barrier; the first of them writes its channels.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases

if TYPE_CHECKING:
    from moe_nvfp4.kernels.delta_net import DeltaInputs, DeltaState, DeltaWeights


def delta_step(
    inputs: "DeltaInputs", weights: "DeltaWeights", state: "DeltaState", rows: Rows, out_TV: Tensor, eps: float
) -> None:
    """Writes the first `rows.decodes` rows of out; the twin is delta_net.delta_net_twin."""
    heads = state.heads
    step_heads[(heads.HV, rows.decodes)](
        *inputs, *weights, *state, rows.slots, rows.lengths, out_TV, *(x.stride(0) for x in inputs), eps,
        **heads._asdict(), K=state.conv.shape[1], W=warps_for(heads.DV),
        num_warps=warps_for(heads.DV), **launch_options(out_TV),
    )  # fmt: skip


def warps_for(dv: int) -> int:
    """32 columns a warp."""
    return max(1, dv // 32)


@constexpr_function
def state_layout(DK, DV, W):
    """Of [DK, DV]: every warp has all rows of DV // W columns, a thread four of them."""
    across = DV // W // 4
    return gl.BlockedLayout([4, 4], [32 // across, across], [1, W], [1, 0])


@gluon.jit
def step_heads(
    mixed_ptr, z_ptr, b_ptr, a_ptr, conv_ptr, decay_ptr, step_ptr, norm_ptr, ring_ptr, state_ptr,
    slots_ptr, lengths_ptr, out_ptr, stride_mixed, stride_z, stride_b, stride_a, eps,
    HK: gl.constexpr, HV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, K: gl.constexpr, W: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = 2 * HK * DK + HV * DV
    STATE: gl.constexpr = state_layout(DK, DV, W)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    h = gl.program_id(0)
    row = gl.program_id(1).to(gl.int64)
    slot = gl.load(slots_ptr + row).to(gl.int64)
    position = gl.maximum(gl.load(lengths_ptr + row) - 1, 0)
    dk = gl.arange(0, DK, gl.SliceLayout(1, STATE))
    dv = gl.arange(0, DV, gl.SliceLayout(0, STATE))
    state_ptr += (slot * HV + h) * (DK * DV)
    at = dk[:, None] * DV + dv[None, :]
    started = (at >= 0) & (position > 0)
    state = gl.load(state_ptr + at, mask=started, other=0.0)
    ring_ptr += slot * K * C
    q_at = h // (HV // HK) * DK + gl.arange(0, DK, FLAT)
    k_at = q_at + HK * DK
    v_at = 2 * HK * DK + h * DV + dv
    q, q_now = _earlier(ring_ptr, conv_ptr, q_at, position, C, K)
    k, k_now = _earlier(ring_ptr, conv_ptr, k_at, position, C, K)
    v, v_now = _earlier(ring_ptr, conv_ptr, v_at, position, C, K)
    decay = gl.load(decay_ptr + h)
    step = gl.load(step_ptr + h)
    norm = gl.load(norm_ptr + dv).to(gl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mixed_ptr += row * stride_mixed
    q_in = gl.load(mixed_ptr + q_at)
    k_in = gl.load(mixed_ptr + k_at)
    v_in = gl.load(mixed_ptr + v_at)
    a = gl.load(a_ptr + row * stride_a + h).to(gl.float32)
    b = gl.load(b_ptr + row * stride_b + h).to(gl.float32)
    z = gl.load(z_ptr + row * stride_z + h * DV + dv).to(gl.float32)
    ring_ptr += position % K * C
    first = h % (HV // HK) == 0
    gl.store(ring_ptr + q_at, q_in, mask=(q_at >= 0) & first)
    gl.store(ring_ptr + k_at, k_in, mask=(q_at >= 0) & first)
    gl.store(ring_ptr + v_at, v_in)
    q = gl.convert_layout(_silu(q + q_now * q_in.to(gl.float32)), gl.SliceLayout(1, STATE))
    k = gl.convert_layout(_silu(k + k_now * k_in.to(gl.float32)), gl.SliceLayout(1, STATE))
    v = _silu(v + v_now * v_in.to(gl.float32))
    q_scale = gl.rsqrt(gl.sum(q * q, 0) + 1e-6) * (DK**-0.5)
    k_scale = gl.rsqrt(gl.sum(k * k, 0) + 1e-6)
    qk = gl.sum(q * k, 0) * q_scale * k_scale
    beta = 1 / (1 + gl.exp(-b))
    a += step
    fade = gl.exp(decay * (gl.maximum(a, 0.0) + gl.log(1 + gl.exp(-gl.abs(a)))))
    by_q = gl.sum(state * q[:, None], 0) * (fade * q_scale)
    by_k = gl.sum(state * k[:, None], 0) * (fade * k_scale)
    added = beta * (v - by_k)
    gl.store(state_ptr + at, fade * state + (k * k_scale)[:, None] * added[None, :])
    o = by_q + qk * added
    o = o * gl.rsqrt(gl.sum(o * o, 0) / DV + eps) * norm * _silu(z)
    gl.store(out_ptr + row * (HV * DV) + h * DV + dv, o.to(out_ptr.dtype.element_ty))


@gluon.jit
def _earlier(ring_ptr, conv_ptr, channel, position, C: gl.constexpr, K: gl.constexpr):
    """The convolution's terms of the K - 1 positions before, as far as there are any; the weight of this one."""
    y = 0.0
    for tap in gl.static_range(1, K):
        x = gl.load(ring_ptr + (position + K - tap) % K * C + channel, mask=(channel >= 0) & (position >= tap), other=0)
        y += x.to(gl.float32) * gl.load(conv_ptr + channel * K + (K - 1 - tap)).to(gl.float32)
    return y, gl.load(conv_ptr + channel * K + (K - 1)).to(gl.float32)


@gluon.jit
def _silu(x):
    return x / (1 + gl.exp(-x))


def compile_cases() -> list[CompileCase]:
    signature = dict.fromkeys(("mixed_ptr", "z_ptr", "b_ptr", "a_ptr", "conv_ptr", "norm_ptr", "ring_ptr"), "*bf16")
    signature |= dict.fromkeys(("decay_ptr", "step_ptr", "state_ptr"), "*fp32") | {"out_ptr": "*bf16", "eps": "fp32"}
    signature |= dict.fromkeys(("slots_ptr", "lengths_ptr"), "*i32")
    signature |= dict.fromkeys(("stride_mixed", "stride_z", "stride_b", "stride_a"), "i32")
    sizes = {"HK": 16, "DK": 128, "DV": 128, "K": 4, "W": 4}
    cases = []
    for heads in (32, 64):
        cases += pdl_cases(f"step_heads {heads}", step_heads, signature, {"num_warps": 4}, HV=heads, **sizes)
    return cases
