"""Inputs of gated delta layers, and what they should give, by the definition in float64, a row after the other."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_nvfp4.kernels.delta_net import DeltaInputs, DeltaWeights, delta_net, delta_net_kernels
from moe_nvfp4.kernels.delta_state import DeltaState, Heads
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rows import Rows

TAPS, EPS = 4, 1e-6
SMALL = Heads(2, 4, 32, 16)
QWEN = Heads(16, 32, 128, 128)
# (slot, tokens before, rows) of each sequence
DECODES = [(3, 7, 1), (1, 0, 1), (0, 2, 1), (4, 640, 1)]
PREFILLS = [(2, 0, 70), (0, 5, 2), (1, 0, 128), (5, 1, 65)]
STEPS = {"decode": DECODES, "prefill": PREFILLS, "mixed": [(3, 9, 1), (4, 0, 1), *PREFILLS]}
KEEPING = [(3, 9, 1), (2, 0, 70), (0, 5, 2), (4, 64, 192), (1, 0, 65)]
LINES = [-1, 5, -1, 7, -1]  # of those, as in Rows.lines


class Layer(NamedTuple):
    inputs: DeltaInputs
    weights: DeltaWeights
    state: DeltaState


def layer(
    heads: Heads,
    pieces: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: str = "cpu",
    scale: float = 1.0,
    lines: int = 0,
) -> Layer:
    """The inputs are columns of one wide tensor. Slots hold NaN where nothing may be read. `scale` is that of v. Heads
    were written at any time since their last turn. `lines`: so many slots at least."""
    count = sum(rows for _, _, rows in pieces)
    keys, values = heads.HK * heads.DK, heads.HV * heads.DV
    channels = heads.channels
    wide = torch.randn(count, channels + values + 2 * heads.HV)
    wide[:, 2 * keys : channels] *= scale
    parts = wide.to(dtype).to(device).split((channels, values, heads.HV, heads.HV), dim=1)
    weights = DeltaWeights(
        conv=(torch.randn(channels, TAPS) / 2).to(dtype),
        decay=-torch.rand(heads.HV) / 2,
        step=torch.randn(heads.HV),
        norm=(1 + torch.randn(heads.DV) / 4).to(dtype),
    )
    slots = max(1 + max(slot for slot, _, _ in pieces), lines)
    state = DeltaState.empty((slots,), heads, TAPS, dtype)
    for part in state:
        part.fill_(torch.nan if part.is_floating_point() else 0x7F7F7F7F)
    for slot, before, _ in pieces:
        if before:
            state.recurrent[slot] = torch.randn(state.recurrent.shape[1:]) / 3 * scale
            cells = torch.arange(max(0, before - TAPS), before) % TAPS
            conv = torch.randn(len(cells), channels)
            conv[:, 2 * keys :] *= scale
            state.conv[slot, cells] = conv.to(dtype)
            for head in range(heads.HV):
                since = (before + head) % state.period
                first = random.randint(max(0, since - before + 1), since)
                state.written[slot, head] = before - since + first
                k, added = torch.randn(since - first, heads.DK), torch.randn(since - first, heads.DV) / 3 * scale
                state.entries[slot, head, first:since] = torch.cat((F.normalize(k), added), dim=1)
                state.fades[slot, head, first:since] = torch.rand(since - first)
    state = DeltaState(*(part.to(device) for part in state))
    return Layer(DeltaInputs(*parts), DeltaWeights(*(x.to(device) for x in weights)), state)


def copy(state: DeltaState) -> DeltaState:
    return DeltaState(*(x.clone() for x in state))


def reference(case: Layer, pieces: Sequence[tuple[int, int, int]], eps: float = EPS) -> tuple[Tensor, DeltaState]:
    heads = case.state.heads
    mixed, z, b, a = (x.cpu().double() for x in case.inputs)
    conv, decay, step, norm = (x.cpu().double() for x in case.weights)
    state = DeltaState(*(x.to("cpu", torch.float64, copy=True) for x in case.state))
    out, row = torch.empty(len(mixed), heads.HV, heads.DV, dtype=torch.float64), 0
    for slot, before, count in pieces:
        ring, memory = state.conv[slot], state.memory(slot, before)
        for position in range(before, before + count):
            ring[position % TAPS] = mixed[row]
            y = sum(ring[(position - j) % TAPS] * conv[:, TAPS - 1 - j] for j in range(min(TAPS, position + 1)))
            q, k, v = (y * y.sigmoid()).split((heads.HK * heads.DK,) * 2 + (heads.HV * heads.DV,))
            q, k = (x.view(heads.HK, heads.DK) for x in (q, k))
            q, k = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
            for h in range(heads.HV):
                q_h, k_h = q[h * heads.HK // heads.HV] / heads.DK**0.5, k[h * heads.HK // heads.HV]
                memory[h] *= (decay[h] * (1 + (a[row, h] + step[h]).exp()).log()).exp()
                missing = v.view(heads.HV, heads.DV)[h] - memory[h].T @ k_h
                memory[h] += torch.outer(k_h, missing * b[row, h].sigmoid())
                o = memory[h].T @ q_h
                gate = z[row].view(heads.HV, heads.DV)[h]
                out[row, h] = o / (o.square().mean() + eps).sqrt() * norm * gate * gate.sigmoid()
            row += 1
        state.recurrent[slot], state.written[slot] = memory, before + count
    return out.flatten(1), state


def memories(state: DeltaState, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    """Of each sequence, after its rows."""
    return torch.stack([state.memory(slot, before + count) for slot, before, count in pieces])


def run(inputs: DeltaInputs, weights: DeltaWeights, state: DeltaState, rows: Rows) -> Tensor:
    if inputs.mixed_TC.is_cuda:  # where delta_net leaves float32 to the twin
        return delta_net_kernels(inputs, weights, state, rows, EPS)
    return delta_net(*inputs, weights, state, rows, EPS)


def check(
    heads: Heads,
    pieces: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    tolerance: float,
    device: str = "cpu",
    scale: float = 1.0,
) -> None:
    """Output, memories and rings; other slots, and cells of the ring that no row entered, keep their bits."""
    case = layer(heads, pieces, dtype, device, scale)
    expected, after = reference(case, pieces)
    rows = Rows.of(pieces, device)
    actual = run(case.inputs, case.weights, case.state, rows)
    assert actual.dtype == dtype
    assert relative_error(actual.cpu(), expected) < tolerance
    slots = [slot for slot, _, _ in pieces]
    assert relative_error(memories(case.state, pieces).cpu(), after.recurrent[slots]) < min(tolerance, 1.5e-3)
    others = [slot for slot in range(len(after.recurrent)) if slot not in slots]
    assert all(part[others].isnan().all() for part in (case.state.recurrent, case.state.entries, case.state.fades))
    assert torch.equal(case.state.written[others].cpu(), after.written[others].int())
    assert torch.equal(case.state.conv.cpu().double().nan_to_num(99.0), after.conv.nan_to_num(99.0))


def check_lines(heads: Heads, dtype: torch.dtype, device: str = "cpu") -> None:
    """A step that leaves states in lines does all else as one without, and a sequence that is cut there has the same in
    its slot. To the bit: a kernel's unit is of the largest of all rows, and here that is the first one."""
    case, begin, kept = layer(heads, KEEPING, dtype, device, lines=9), 0, []
    for (slot, before, count), line in zip(KEEPING, LINES, strict=True):
        if line >= 0:
            rows = (count - 1) // 64 * 64
            kept.append((slot, before, rows, line, slice(begin, begin + rows), slice(begin + rows, begin + count)))
            case.inputs.mixed_TC[begin, 2 * heads.HK * heads.DK :] *= 16
        begin += count
    plain, cut = copy(case.state), copy(case.state)
    expected = run(case.inputs, case.weights, plain, Rows.of(KEEPING, device))
    require_same(run(case.inputs, case.weights, case.state, Rows.of(KEEPING, device, LINES)), expected)
    others = [line for line in range(9) if line not in LINES]
    for part, before in zip(case.state, plain, strict=True):
        require_same(part[others], before[others])
    for slot, before, rows, line, first, last in kept:
        run(DeltaInputs(*(x[first] for x in case.inputs)), case.weights, cut, Rows.of([(slot, before, rows)], device))
        for part, one in ((case.state.conv, cut.conv), (case.state.recurrent, cut.recurrent)):
            require_same(part[line], one[slot])
        assert (case.state.written[line] == before + rows).all()
        for part in case.state:
            part[6] = part[line]
        piece = (6, before + rows, last.stop - last.start)
        rest = run(DeltaInputs(*(x[last] for x in case.inputs)), case.weights, case.state, Rows.of([piece], device))
        assert relative_error(rest, expected[last]) < (TOLERANCE["bfloat16"] if dtype == torch.bfloat16 else 1e-3)


def require_same(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one.double().nan_to_num(99.0), other.double().nan_to_num(99.0))
