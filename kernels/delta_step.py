"""One token of each sequence through the gated delta rule, in one launch: a program for each sequence and value head.

The state [DK, DV] of the head is read into registers, and what entries hold since it was written is added there, on
sm_90 and later while the launch before may still run. From LAZY_FROM sequences on a head writes its state in its turn
only (delta_state.py), or else an entry: 82 KB instead of 128 for each head of 128 x 128 and token. With fewer there is
bandwidth to spare, and adding up entries would take longer than writing states. A warp has all DK rows of its columns,
so sums over DK need no barrier. Since (g S + k d^T)^T q = g S^T q + (k . q) d, both products with S are taken in the
same pass, before d is known.

32 heads of 128 x 128 on one H200, us for 1, 8, 32, 64 and 256 sequences, the mean over a period, LAZY_FROM = 1:

    written at every token, two programs on a multiprocessor    3.0   10.8   39.5   75.8   293
    every 2 tokens, three programs                              3.5    9.3   31.7   57.9   211
    every 4                                                     3.7    8.6   26.8   48.2   174
    every 8                                                     4.8   10.0   27.1   47.2   165
    every 16                                                    6.9   12.8   30.9   53.1   185

The first is the kernel before this one: 3.7 TB/s at 256 sequences, where every 8 tokens is 3.9. An entry adds 0.27 us
where nothing hides it. This one with fewer than LAZY_FROM sequences, writing at every token, was not timed.

What is read before the launch before has ended, the state, the ring of earlier inputs and the weights, that launch must
not write. Nobody reads the cell of the ring that is written, so the programs that share a key head need no barrier; the
first of them writes its channels.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.delta_state import LAZY_FROM, PERIOD, DeltaState
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases

if TYPE_CHECKING:
    from moe_nvfp4.kernels.delta_net import DeltaInputs, DeltaWeights


def delta_step(
    inputs: "DeltaInputs", weights: "DeltaWeights", state: DeltaState, rows: Rows, out_TV: Tensor, eps: float
) -> None:
    """Writes the first `rows.decodes` rows of out; the twin is delta_net.delta_net_twin."""
    heads = state.heads
    step_heads[(heads.HV, rows.decodes)](
        *inputs, *weights, *state, rows.slots, rows.lengths, out_TV, *(x.stride(0) for x in inputs), eps,
        **heads._asdict(), K=state.conv.shape[1], N=state.period, W=warps_for(heads.DV), LAZY_FROM=LAZY_FROM,
        num_warps=warps_for(heads.DV), **launch_options(out_TV),
    )  # fmt: skip


def warps_for(dv: int) -> int:
    """32 columns a warp."""
    return max(1, dv // 32)


@constexpr_function
def state_layout(DV, W):
    """Of [DK, DV]: every warp has all rows of DV // W columns, a thread four of them."""
    across = DV // W // 4
    return gl.BlockedLayout([4, 4], [32 // across, across], [1, W], [1, 0])


@constexpr_function
def entries_layout(D, W):
    along = min(32, D // 4)
    return gl.BlockedLayout([1, 4], [32 // along, along], [W, 1], [1, 0])


@gluon.jit
def step_heads(
    mixed_ptr, z_ptr, b_ptr, a_ptr, conv_ptr, decay_ptr, step_ptr, norm_ptr, ring_ptr, state_ptr, entries_ptr,
    fades_ptr, written_ptr, slots_ptr, lengths_ptr, out_ptr, stride_mixed, stride_z, stride_b, stride_a, eps,
    HK: gl.constexpr, HV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, K: gl.constexpr, N: gl.constexpr,
    W: gl.constexpr, LAZY_FROM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = 2 * HK * DK + HV * DV
    STATE: gl.constexpr = state_layout(DV, W)
    ROWS: gl.constexpr = gl.SliceLayout(1, STATE)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, STATE)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    WARP: gl.constexpr = gl.BlockedLayout([4], [32], [W], [0])  # each warp has all DK, up to 128
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    h = gl.program_id(0)
    row = gl.program_id(1).to(gl.int64)
    slot = gl.load(slots_ptr + row).to(gl.int64)
    length = gl.load(lengths_ptr + row)
    if length == 0:
        if PDL:
            gdc_wait()  # the launch after this one takes it that all before has ended
        return
    position = length - 1
    head = slot * HV + h
    since = (position + h) % N
    pending = gl.where(position > 0, since, 0)
    entries_ptr += head * ((N - 1) * (DK + DV))
    fades_ptr += head * (N - 1)
    first = gl.maximum(gl.load(written_ptr + head) - (position - pending), 0)
    k_entries = _entries(entries_ptr, pending, DK, DK + DV, N, W)
    added_entries = _entries(entries_ptr + DK, pending, DV, DK + DV, N, W)
    dk = gl.arange(0, DK, ROWS)
    dv = gl.arange(0, DV, COLUMNS)
    state_ptr += head * (DK * DV)
    at = dk[:, None] * DV + dv[None, :]
    state = gl.load(state_ptr + at, mask=(at >= 0) & (position > 0), other=0.0)
    ring_ptr += slot * K * C
    own_dk = gl.arange(0, DK, ONE)
    own_dv = gl.arange(0, DV, ONE)
    q_at = h // (HV // HK) * DK + own_dk
    k_at = q_at + HK * DK
    v_at = 2 * HK * DK + h * DV + own_dv
    q = _earlier(ring_ptr, conv_ptr, q_at, position, C, K)
    k = _earlier(ring_ptr, conv_ptr, k_at, position, C, K)
    v = _earlier(ring_ptr, conv_ptr, v_at, position, C, K)
    q_now = gl.load(conv_ptr + q_at * K + (K - 1))
    k_now = gl.load(conv_ptr + k_at * K + (K - 1))
    v_now = gl.load(conv_ptr + v_at * K + (K - 1))
    decay = gl.load(decay_ptr + h)
    step = gl.load(step_ptr + h)
    norm = gl.load(norm_ptr + dv)
    k_entries = k_entries._reinterpret(gl.float32, [N, DK], FLAT)
    added_entries = added_entries._reinterpret(gl.float32, [N, DV], FLAT)
    next_fade = gl.load(fades_ptr + first, mask=first < pending, other=0.0)
    for i in range(first, pending):
        fade = next_fade
        next_fade = gl.load(fades_ptr + i + 1, mask=i + 1 < pending, other=0.0)
        state = _stepped(state, fade, k_entries.index(i).load(ROWS), added_entries.index(i).load(COLUMNS))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mixed_ptr += row * stride_mixed
    q_in = gl.load(mixed_ptr + q_at)
    k_in = gl.load(mixed_ptr + k_at)
    v_in = gl.load(mixed_ptr + v_at)
    a = gl.load(a_ptr + row * stride_a + h).to(gl.float32)
    b = gl.load(b_ptr + row * stride_b + h).to(gl.float32)
    z = gl.load(z_ptr + row * stride_z + h * DV + dv)
    ring_ptr += position % K * C
    shown = (own_dk >= 0) & (h % (HV // HK) == 0)
    gl.store(ring_ptr + q_at, q_in, mask=shown)
    gl.store(ring_ptr + k_at, k_in, mask=shown)
    gl.store(ring_ptr + v_at, v_in)
    # By way of shared memory, so that threads need not have all of q and k in registers beside the state.
    qs = gl.allocate_shared_memory(gl.float32, [DK], FLAT, _convolved(q, q_in, q_now))
    ks = gl.allocate_shared_memory(gl.float32, [DK], FLAT, _convolved(k, k_in, k_now))
    vs = gl.allocate_shared_memory(gl.float32, [DV], FLAT, _convolved(v, v_in, v_now))
    q, k, v = qs.load(WARP), ks.load(WARP), vs.load(COLUMNS)
    q_scale = gl.rsqrt(gl.sum(q * q, 0) + 1e-6) * (DK**-0.5)
    k_scale = gl.rsqrt(gl.sum(k * k, 0) + 1e-6)
    qk = gl.sum(q * k, 0) * q_scale * k_scale
    beta = 1 / (1 + gl.exp(-b))
    a += step
    fade = gl.exp(decay * (gl.maximum(a, 0.0) + gl.log(1 + gl.exp(-gl.abs(a)))))
    by_q = gl.sum(state * qs.load(ROWS)[:, None], 0) * (fade * q_scale)
    by_k = gl.sum(state * ks.load(ROWS)[:, None], 0) * (fade * k_scale)
    added = beta * (v - by_k)
    o = by_q + qk * added
    o = o * gl.rsqrt(gl.sum(o * o, 0) / DV + eps) * norm.to(gl.float32) * _silu(z.to(gl.float32))
    gl.store(out_ptr + row * (HV * DV) + h * DV + dv, o.to(out_ptr.dtype.element_ty))
    # Last: earlier, it takes registers that a third program on a multiprocessor needs.
    if (since == N - 1) | (position == 0) | (gl.num_programs(1) < LAZY_FROM):
        gl.store(state_ptr + at, _stepped(state, fade, ks.load(ROWS) * k_scale, added))
        gl.store(written_ptr + head, position + 1)
    else:
        entries_ptr += since * (DK + DV)
        gl.store(entries_ptr + own_dk, ks.load(ONE) * k_scale)
        gl.store(entries_ptr + DK + dv, added)
        gl.store(fades_ptr + since, fade)


@gluon.jit
def _entries(ptr, count, D: gl.constexpr, stride: gl.constexpr, N: gl.constexpr, W: gl.constexpr):
    """One part of the first `count` entries, in shared memory."""
    LAYOUT: gl.constexpr = entries_layout(D, W)
    i = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    entries = gl.load(ptr + i * stride + d, mask=(i < count) & (d >= 0), other=0.0)
    return gl.allocate_shared_memory(gl.float32, [N, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), entries)


@gluon.jit
def _stepped(state, fade, k, added):
    """Spelled out, here and in delta_chunks.py, so that bits do not depend on when a state is written."""
    return gl.fma(state, gl.full_like(state, 0.0) + fade, k[:, None] * added[None, :])


@gluon.jit
def _earlier(ring_ptr, conv_ptr, channel, position, C: gl.constexpr, K: gl.constexpr):
    """The convolution's terms of the K - 1 positions before, as far as there are any."""
    y = 0.0
    for tap in gl.static_range(1, K):
        x = gl.load(ring_ptr + (position + K - tap) % K * C + channel, mask=(channel >= 0) & (position >= tap), other=0)
        y += x.to(gl.float32) * gl.load(conv_ptr + channel * K + (K - 1 - tap)).to(gl.float32)
    return y


@gluon.jit
def _convolved(earlier, x, weight):
    return _silu(earlier + x.to(gl.float32) * weight.to(gl.float32))


@gluon.jit
def _silu(x):
    return x / (1 + gl.exp(-x))


def compile_cases() -> list[CompileCase]:
    signature = dict.fromkeys(("mixed_ptr", "z_ptr", "b_ptr", "a_ptr", "conv_ptr", "norm_ptr", "ring_ptr"), "*bf16")
    signature |= dict.fromkeys(("decay_ptr", "step_ptr", "state_ptr", "entries_ptr", "fades_ptr"), "*fp32")
    signature |= dict.fromkeys(("written_ptr", "slots_ptr", "lengths_ptr"), "*i32")
    signature |= dict.fromkeys(("stride_mixed", "stride_z", "stride_b", "stride_a"), "i32")
    signature |= {"out_ptr": "*bf16", "eps": "fp32"}
    sizes = {"HK": 16, "DK": 128, "DV": 128, "K": 4, "N": PERIOD, "W": 4, "LAZY_FROM": LAZY_FROM}
    cases = []
    for heads in (32, 64):
        cases += pdl_cases(f"step_heads {heads}", step_heads, signature, {"num_warps": 4}, HV=heads, **sizes)
    return cases
