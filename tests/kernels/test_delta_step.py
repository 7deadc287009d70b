"""One row of each sequence: the fused launch against the definition in float64, on a GPU; Gluon has no interpreter."""

import random

import pytest
import torch
from delta_cases import DECODES, EPS, QWEN, SMALL, TAPS, Layer, check, layer, reference

from moe_nvfp4.kernels import delta_step
from moe_nvfp4.kernels.delta_net import DeltaInputs, delta_net_kernels
from moe_nvfp4.kernels.delta_state import PERIOD, DeltaState, Heads
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rows import Rows

DTYPES = [torch.float32, torch.bfloat16]
HEADS = Heads(4, 8, 128, 128)
LAZY, EAGER = 1, 1000  # from so many sequences on, states are not written at every token


@pytest.fixture(params=[LAZY, EAGER], ids=["lazy", "eager"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_step, "LAZY_FROM", request.param)


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE["float32" if dtype == torch.float32 else "bfloat16"]


@pytest.mark.gpu
@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [SMALL, QWEN, Heads(16, 64, 128, 128)])
def test_gpu(heads: Heads, dtype: torch.dtype) -> None:
    check(heads, DECODES, dtype, tolerance(dtype), "cuda")


def decode(case: Layer, state: DeltaState, slots: list[int], first: int, end: int) -> torch.Tensor:
    """The case's rows from `first` to `end`, one after the other, in each of the slots: [tokens, slots, HV DV]."""
    outputs = []
    for position in range(first, end):
        inputs = DeltaInputs(*(x[position : position + 1].expand(len(slots), -1) for x in case.inputs))
        rows = Rows.of([(slot, position, 1) for slot in slots], "cuda")
        outputs.append(delta_net_kernels(inputs, case.weights, state, rows, EPS))
        torch.cuda.synchronize()  # no launch may begin before the last one has written the state
    return torch.stack(outputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("either")
def test_many_tokens_in_a_graph() -> None:
    """From an empty slot through several turns; positions and inputs change under one captured graph."""
    count = 3 * PERIOD + 3
    pieces = [(1, 0, count)]
    case = layer(HEADS, pieces, torch.float32, "cuda")
    expected, after = reference(case, pieces)
    rows = Rows.of([(1, 0, 1)], "cuda")
    inputs = DeltaInputs(*(x[:1].clone() for x in case.inputs))
    spare = DeltaState(*(x.clone() for x in case.state))
    delta_net_kernels(inputs, case.weights, spare, rows, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = delta_net_kernels(inputs, case.weights, case.state, rows, EPS)
    for position in range(count):
        for target, source in zip(inputs, case.inputs, strict=True):
            target.copy_(source[position : position + 1])
        rows.lengths.fill_(position + 1)
        graph.replay()
        assert relative_error(out[0].cpu(), expected[position]) < TOLERANCE["float32"]
    assert relative_error(case.state.memory(1, count).cpu(), after.recurrent[1]) < TOLERANCE["float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_when_states_are_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * PERIOD + 5
    case = layer(HEADS, [(0, 0, count)], dtype, "cuda")
    outputs = []
    for period, eager in ((2, 0.0), (4, 0.0), (8, 0.0), (8, 1.0), (8, 0.2), (8, 0.5)):
        state = DeltaState.empty((1,), HEADS, TAPS, dtype, "cuda", period)
        tokens = []
        for token in range(count):
            monkeypatch.setattr(delta_step, "LAZY_FROM", EAGER if random.random() < eager else LAZY)
            tokens.append(decode(case, state, [0], token, token + 1))
        outputs.append(torch.cat(tokens))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("either")
def test_what_the_last_sequence_of_a_slot_left_is_not_used() -> None:
    case = layer(HEADS, [(0, 0, 21)], torch.bfloat16, "cuda")
    outputs = [decode(case, case.state, [0], 0, count) for count in (21, 21, 6, 21)]
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[3], outputs[0])


@pytest.mark.gpu
@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("cut", [1, 5, 8, 13])
def test_a_copied_line_goes_on_alike(cut: int) -> None:
    case = layer(HEADS, [(1, 0, 30)], torch.bfloat16, "cuda")
    state = DeltaState.empty((4,), HEADS, TAPS, torch.bfloat16, "cuda")
    decode(case, state, [1], 0, cut)
    for part in state:
        part[3].copy_(part[1])
    together = decode(case, state, [3, 1], cut, 30)
    assert together.isfinite().all()
    assert torch.equal(together[:, 0], together[:, 1])


@pytest.mark.gpu
@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("cut", [1, 11, 16])
def test_a_prompt_after_decoded_tokens(cut: int) -> None:
    pieces = [(1, 0, cut + 70 + PERIOD)]
    case = layer(HEADS, pieces, torch.float32, "cuda")
    expected, after = reference(case, pieces)
    decode(case, case.state, [1], 0, cut)
    part = DeltaInputs(*(x[cut : cut + 70] for x in case.inputs))
    chunk = delta_net_kernels(part, case.weights, case.state, Rows.of([(1, cut, 70)], "cuda"), EPS)
    assert relative_error(chunk.cpu(), expected[cut : cut + 70]) < 1e-3
    assert (case.state.written[1] == cut + 70).all()
    later = decode(case, case.state, [1], cut + 70, cut + 70 + PERIOD)
    assert relative_error(later[:, 0].cpu(), expected[cut + 70 :]) < 1e-3
    memory = case.state.memory(1, cut + 70 + PERIOD)
    assert relative_error(memory.cpu(), after.recurrent[1]) < 1e-3


@pytest.mark.gpu
def test_a_prompt_gives_the_same_bits_whenever_states_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case, outputs = layer(HEADS, [(0, 0, 83)], torch.bfloat16, "cuda"), []
    for lazy in (LAZY, EAGER):
        monkeypatch.setattr(delta_step, "LAZY_FROM", lazy)
        state = DeltaState.empty((1,), HEADS, TAPS, torch.bfloat16, "cuda")
        decode(case, state, [0], 0, 13)
        assert (state.written[0] == 13).all() == (lazy == EAGER)
        part = DeltaInputs(*(x[13:] for x in case.inputs))
        outputs.append(delta_net_kernels(part, case.weights, state, Rows.of([(0, 13, 70)], "cuda"), EPS))
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_every_step_writes_as_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_step, "LAZY_FROM", LAZY)
    heads = Heads(2, 2 * PERIOD, 32, 32)
    case = layer(heads, [(0, 0, 3 * PERIOD)], torch.bfloat16, "cuda")
    for position in range(3 * PERIOD):
        before = case.state.recurrent.clone()
        decode(case, case.state, [0], position, position + 1)
        changed = (case.state.recurrent != before)[0].flatten(1).any(1)  # NaN differs from itself
        assert changed.sum() == (2 if position else 2 * PERIOD)
        assert torch.equal(changed, case.state.written[0] == position + 1)
