"""Prompts through the gated delta rule, 64 rows at a time.

What a chunk adds to the state S [DK, DV], one row u_i for each of its own, solves a triangular system:

    (I + A) u = beta (v - e^c k S),  A_ij = beta_i e^(c_i - c_j) k_i . k_j for j < i,  c the running sum of log decays
    o_i = e^(c_i) q_i S + sum_(j <= i) e^(c_i - c_j) (q_i . k_j) u_j,  S' = e^(c_L) S + sum_i e^(c_L - c_i) k_i u_i

After delta_conv.py, `invert_chunks` (a program for each chunk and value head) inverts I + A by doubling: the inverse of
the blocks of 2 s is X - X A' X, X that of the blocks of s, A' what lies between pairs of them. `scan_chunks` (a program
for each sequence, value head and 64 columns of S) carries S^T through the chunks in registers; transposed, so that
every product's result is the next one's first operand where it lies; before a sequence's last chunk it also leaves it
in the line that `Rows.lines` names, as if the sequence had ended there. `norm_chunks` is the gated norm.

Operands of tensor cores are float16, sums float32. |q| = |k| = 1, and no entry of the inverse exceeds 1, so only v and
S need a unit: one for each sequence and head. On random inputs the output is off by 5e-4 before it is rounded; in a
simulation float16 gives 5e-4 and bfloat16 4e-3, two to three times that when keys are nearly parallel. TF32 would be as
exact as float16 at half the speed.

Eight prompts of 2048 rows on an H200, 16 and 32 heads of 128, µs: convolution 190, inverses 199, scan 211, norm 100.
An earlier scan that held all columns of a head and normalised took 340 instead of the last two.

Letters: L rows of a chunk; places of chunks as in rows.chunk_places.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.delta_conv import delta_conv, silu
from moe_nvfp4.kernels.delta_state import PERIOD, DeltaState
from moe_nvfp4.kernels.rows import CHUNK, Rows
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases

if TYPE_CHECKING:
    from moe_nvfp4.kernels.delta_net import DeltaInputs, DeltaWeights

_COLUMNS: Final = 64  # of S in a program of the scan: 211 us against 249 with 128, 89 against 117 for one prompt


def delta_chunks(
    inputs: "DeltaInputs", weights: "DeltaWeights", state: DeltaState, rows: Rows, out_TV: Tensor, eps: float
) -> None:
    """Writes the rows of all of `rows`' sequences; the twin is delta_net.delta_net_twin.

    Scratch is, a row, 2 HK DK + HV (DV + 132) numbers of two bytes: 25 KB at 16 and 32 heads of 128.
    """
    heads, mixed_TC, sequences = state.heads, inputs.mixed_TC, rows.slots.numel()
    described = rows.slots, rows.starts, rows.lengths
    options = launch_options(out_TV)
    chunks = delta_conv(mixed_TC, weights.conv, state, rows)
    half, single = chunks.q.new_empty, chunks.units.new_empty
    places = rows.chunks.numel()
    squares = (places, heads.HV, CHUNK, CHUNK)
    solve, attend, grown, fading = half(squares), half(squares), single(squares[:3]), single(squares[:3])
    invert_chunks[(heads.HV, places)](
        inputs.b_TH, inputs.a_TH, weights.decay, weights.step, rows.starts, rows.chunks, chunks.q, chunks.k, solve,
        attend, grown, fading, inputs.b_TH.stride(0), inputs.a_TH.stride(0), HK=heads.HK, HV=heads.HV, DK=heads.DK,
        L=CHUNK, num_warps=4, **options,
    )  # fmt: skip
    scales = single(sequences, heads.HV)
    columns = min(heads.DV, _COLUMNS)
    scan_chunks[(heads.DV // columns, heads.HV, sequences)](
        mixed_TC, *state, *described, rows.lines, *chunks, solve, attend, grown, fading, scales, mixed_TC.stride(0),
        **heads._asdict(), K=state.conv.shape[1], N=state.period, L=CHUNK, BV=columns,
        num_warps=max(1, columns // 16), num_stages=2, **options,
    )  # fmt: skip
    norm_chunks[(heads.HV, places)](
        chunks.v, scales, inputs.z_TV, weights.norm, state.written, *described, rows.chunks, out_TV,
        inputs.z_TV.stride(0), eps, HV=heads.HV, DV=heads.DV, L=CHUNK, ASM=out_TV.is_cuda,
        num_warps=max(1, heads.DV // 32), **options,
    )  # fmt: skip


@triton.jit
def invert_chunks(
    b_ptr, a_ptr, decay_ptr, step_ptr, starts_ptr, chunks_ptr, q_ptr, k_ptr, solve_ptr, attend_ptr, grown_ptr,
    fading_ptr, stride_b, stride_a,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    place = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence = tl.load(chunks_ptr + place)
    if sequence < 0:
        return
    start = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - start
    first = (place - start // L - sequence) * L
    place = place.to(tl.int64)
    i = tl.arange(0, L)
    dk = tl.arange(0, DK)
    live = first + i < rows
    token = start.to(tl.int64) + first + i
    a = tl.load(a_ptr + token * stride_a + h, mask=live, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + token * stride_b + h, mask=live, other=0.0).to(tl.float32)
    log_decay = tl.load(decay_ptr + h) * _softplus(a + tl.load(step_ptr + h))
    log_decay = tl.where(live, log_decay, 0.0)
    total = tl.cumsum(log_decay, 0)
    beta = tl.where(live, 1 / (1 + tl.exp(-b)), 0.0)
    head = place * HV + h
    tl.store(grown_ptr + head * L + i, tl.exp(total))
    tl.store(fading_ptr + head * L + i, tl.exp(tl.sum(log_decay, 0) - total))

    tile = (place * HK + h // (HV // HK)) * (L * DK) + i[:, None] * DK + dk[None, :]
    k = tl.load(k_ptr + tile)
    products = tl.dot(tl.load(q_ptr + tile), tl.trans(k))
    fade = tl.exp(tl.where(i[:, None] >= i[None, :], total[:, None] - total[None, :], float("-inf")))
    square = head * (L * L) + i[:, None] * L + i[None, :]
    tl.store(attend_ptr + square, (products * fade).to(tl.float16))
    system = tl.where(i[:, None] > i[None, :], tl.dot(k, tl.trans(k)) * fade * beta[:, None], 0.0)
    tl.store(solve_ptr + square, (_inverse(system, L) * beta[None, :]).to(tl.float16))


@triton.jit
def _inverse(lower, L: tl.constexpr):
    """Of I + lower, which is strictly lower triangular."""
    i = tl.arange(0, L)
    apart = i[:, None] ^ i[None, :]
    x = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, lower, 0.0)
    lower = lower.to(tl.float16)
    tl.static_assert(L == 64)
    for level in tl.static_range(1, 6):
        # X holds blocks of 2^level. Of X A X only what lies between the two of a pair is new and wanted: there the
        # highest bit in which row and column differ is bit `level`.
        half = x.to(tl.float16)
        x -= tl.where((apart >> level) == 1, tl.dot(tl.dot(half, lower).to(tl.float16), half), 0.0)
    return x


@triton.jit
def scan_chunks(
    mixed_ptr, ring_ptr, state_ptr, entries_ptr, fades_ptr, written_ptr, slots_ptr, starts_ptr, lengths_ptr,
    lines_ptr, q_ptr, k_ptr, v_ptr, units_ptr, solve_ptr, attend_ptr, grown_ptr, fading_ptr, scales_ptr, stride_mixed,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    L: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BV columns of S. The outputs, in units and without 1 / sqrt(DK), take the places of v."""
    h = tl.program_id(1)
    sequence = tl.program_id(2)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    SHARE: tl.constexpr = HV // HK
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    start = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - start
    if rows == 0:
        return
    before = tl.load(lengths_ptr + sequence) - rows
    place = (start // L + sequence).to(tl.int64)
    slot = tl.load(slots_ptr + sequence)
    line = tl.load(lines_ptr + sequence)
    i = tl.arange(0, L)
    dk = tl.arange(0, DK)
    dv = tl.program_id(0) * BV + tl.arange(0, BV)
    cell = slot.to(tl.int64) * HV + h
    state_at = state_ptr + cell * (DK * DV) + dk[None, :] * DV + dv[:, None]
    state = tl.load(state_at, mask=(dv[:, None] >= 0) & (before > 0), other=0.0)
    # What one token after the other left since the state was written; most often nothing.
    pending = tl.where(before > 0, (before + h) % N, 0)
    for at in tl.range(tl.maximum(tl.load(written_ptr + cell) - (before - pending), 0), pending):
        entry = cell * (N - 1) + at
        k = tl.load(entries_ptr + entry * (DK + DV) + dk)
        added = tl.load(entries_ptr + entry * (DK + DV) + DK + dv)
        fade = tl.load(fades_ptr + entry) + tl.zeros_like(state)
        state = tl.fma(state, fade, added[:, None] * k[None, :])  # to the bit what delta_step.py would have written
    unit = tl.maximum(
        _largest(units_ptr + place * HV + h, tl.cdiv(rows, L), HV), tl.max(tl.max(tl.abs(state), 1), 0) / 16
    )
    state /= unit
    mixed_ptr += start.to(tl.int64) * stride_mixed
    for first in tl.range(0, rows, L):
        key_tile = (place * HK + h // SHARE) * (L * DK) + i[:, None] * DK + dk[None, :]
        head = place * HV + h
        value_tile = v_ptr + head * (L * DV) + i[None, :] * DV + dv[:, None]
        square = head * (L * L) + i[:, None] * L + i[None, :]
        grown = tl.load(grown_ptr + head * L + i)
        half = state.to(tl.float16)
        k = tl.load(k_ptr + key_tile)
        v = tl.load(value_tile).to(tl.float32)
        missing = v * (tl.load(units_ptr + head) / unit) - tl.dot(half, tl.trans(k)) * grown[None, :]
        added = tl.dot(missing.to(tl.float16), tl.trans(tl.load(solve_ptr + square)))
        o = tl.dot(half, tl.trans(tl.load(q_ptr + key_tile))) * grown[None, :]
        o = tl.dot(added.to(tl.float16), tl.trans(tl.load(attend_ptr + square)), o)
        fading = tl.load(fading_ptr + head * L + i)
        last = tl.load(grown_ptr + head * L + (L - 1))
        state = tl.dot((added * fading[None, :]).to(tl.float16), k, state * last)
        tl.store(value_tile, o.to(tl.float16))
        place += 1
        # One branch for both lines: the slot's after the loop would take more registers.
        end = tl.minimum(first + L, rows)
        target = tl.where(end == rows, slot, tl.where(rows - end <= L, line, -1))
        if target >= 0:
            there = target.to(tl.int64)
            state_at = state_ptr + (there * HV + h) * (DK * DV) + dk[None, :] * DV + dv[:, None]
            tl.store(state_at, state * unit)
            if tl.program_id(0) == 0:
                ring = ring_ptr + there * (K * C)
                _keep(mixed_ptr, ring, 2 * HK * DK + h * DV + tl.arange(0, DV), end, before, stride_mixed, C, K)
                if h % SHARE == 0:
                    _keep(mixed_ptr, ring, h // SHARE * DK + dk, end, before, stride_mixed, C, K)
                    _keep(mixed_ptr, ring, (HK + h // SHARE) * DK + dk, end, before, stride_mixed, C, K)
    if tl.program_id(0) == 0:
        tl.store(scales_ptr + sequence * HV + h, unit * DK**-0.5)
        # Of the slot it is written later, since others read it: see norm_chunks.
        tl.store(written_ptr + line.to(tl.int64) * HV + h, before + (rows - 1) // L * L, mask=line >= 0)


@triton.jit
def _largest(ptr, count, stride):
    top = 0.0
    for first in tl.range(0, count, 64):
        i = first + tl.arange(0, 64)
        top = tl.maximum(top, tl.max(tl.load(ptr + i * stride, mask=i < count, other=0.0), 0))
    return top


@triton.jit
def _keep(mixed_ptr, ring_ptr, channel, rows, before, stride, C: tl.constexpr, K: tl.constexpr):
    """The last inputs of so many rows enter the ring."""
    for tap in tl.static_range(K):
        row = rows - 1 - tap
        mask = (channel >= 0) & (row >= 0)
        x = tl.load(mixed_ptr + row.to(tl.int64) * stride + channel, mask=mask, other=0.0)
        tl.store(ring_ptr + (before + row + K) % K * C + channel, x, mask=mask)


@triton.jit
def norm_chunks(
    o_ptr, scales_ptr, z_ptr, norm_ptr, written_ptr, slots_ptr, starts_ptr, lengths_ptr, chunks_ptr, out_ptr, stride_z,
    eps,
    HV: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    place = tl.program_id(1)
    dv = tl.arange(0, DV)
    norm = tl.load(norm_ptr + dv).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence = tl.load(chunks_ptr + place)
    if sequence < 0:
        return
    start = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - start
    first = (place - start // L - sequence) * L
    place = place.to(tl.int64)
    i = tl.arange(0, L)
    live = (first + i < rows)[:, None]
    token = (start + first + i).to(tl.int64)[:, None]
    z = tl.load(z_ptr + token * stride_z + h * DV + dv[None, :], mask=live, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + (place * HV + h) * (L * DV) + i[:, None] * DV + dv[None, :]).to(tl.float32)
    o *= tl.load(scales_ptr + sequence * HV + h)
    o *= tl.rsqrt(tl.sum(o * o, 1) / DV + eps)[:, None] * norm[None, :] * silu(z, ASM)
    tl.store(out_ptr + token * (HV * DV) + h * DV + dv[None, :], o.to(out_ptr.dtype.element_ty), mask=live)
    if first == 0:  # not in the scan, several of whose programs read it
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        tl.store(written_ptr + slot * HV + h, tl.load(lengths_ptr + sequence))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


def compile_cases() -> list[CompileCase]:
    halves = dict.fromkeys(("q_ptr", "k_ptr", "solve_ptr", "attend_ptr"), "*fp16")
    halves |= dict.fromkeys(("grown_ptr", "fading_ptr"), "*fp32")
    invert = dict.fromkeys(("b_ptr", "a_ptr"), "*bf16") | dict.fromkeys(("decay_ptr", "step_ptr"), "*fp32") | halves
    invert |= {"starts_ptr": "*i32", "chunks_ptr": "*i32", "stride_b": "i32", "stride_a": "i32"}
    scan = dict.fromkeys(("mixed_ptr", "ring_ptr"), "*bf16") | halves | {"v_ptr": "*fp16", "stride_mixed": "i32"}
    scan |= dict.fromkeys(("written_ptr", "slots_ptr", "starts_ptr", "lengths_ptr", "lines_ptr"), "*i32")
    scan |= dict.fromkeys(("state_ptr", "entries_ptr", "fades_ptr", "units_ptr", "scales_ptr"), "*fp32")
    norm = dict.fromkeys(("z_ptr", "norm_ptr", "out_ptr"), "*bf16") | {"o_ptr": "*fp16", "scales_ptr": "*fp32"}
    norm |= dict.fromkeys(("written_ptr", "slots_ptr", "starts_ptr", "lengths_ptr", "chunks_ptr"), "*i32")
    norm |= {"stride_z": "i32", "eps": "fp32"}
    sizes = {"HK": 16, "HV": 32, "DK": 128, "L": CHUNK}
    cases = pdl_cases("invert_chunks", invert_chunks, invert, {"num_warps": 4}, **sizes)
    cases += pdl_cases(
        "scan_chunks", scan_chunks, scan, {"num_warps": 4, "num_stages": 2}, **sizes, DV=128, K=4, N=PERIOD, BV=_COLUMNS
    )
    cases += pdl_cases("norm_chunks", norm_chunks, norm, {"num_warps": 4}, HV=32, DV=128, L=CHUNK, ASM=True)
    # Without wgmma both operands of a product lie in registers, and a few dozen are missing.
    strict = [replace(case, architectures=(90,)) for case in cases if 90 in case.architectures]
    others = [tuple(a for a in case.architectures if a != 90) for case in cases]
    return strict + [replace(c, architectures=o, allowed_spill=160) for c, o in zip(cases, others, strict=True)]
