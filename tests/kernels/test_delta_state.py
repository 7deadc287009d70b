"""Written states and entries since, against the definition one token after the other."""

import pytest
import torch

from moe_nvfp4.kernels.delta_state import LAZY_FROM, PERIOD, DeltaState, Heads, bytes_per_token

HEADS = Heads(1, 11, 16, 32)


def lines(period: int) -> DeltaState:
    return DeltaState.empty((2,), HEADS, 4, torch.bfloat16, period=period)


@pytest.mark.parametrize("period", [1, 2, PERIOD])
def test_memory(period: int) -> None:
    """Each head was written at any time since its last turn. Nobody wrote the other cells."""
    tokens = 2 * PERIOD + 3
    k, added = torch.randn(tokens, HEADS.HV, HEADS.DK), torch.randn(tokens, HEADS.HV, HEADS.DV)
    fades = torch.rand(tokens, HEADS.HV)
    expected = [torch.zeros(HEADS.HV, HEADS.DK, HEADS.DV)]
    for token in range(tokens):
        outer = k[token, :, :, None] * added[token, :, None, :]
        expected.append(fades[token, :, None, None] * expected[-1] + outer)
    for length in range(1, tokens + 1):
        state = lines(period)
        for head in range(HEADS.HV):
            turns = [p + 1 for p in range(1, length) if (p + head) % period == period - 1]
            written = int(torch.randint(max([1, *turns]), length + 1, ()))
            state.written[1, head] = written
            state.recurrent[1, head] = expected[written][head]
            for position in range(written, length):
                cell = (position + head) % period
                state.entries[1, head, cell] = torch.cat((k[position, head], added[position, head]))
                state.fades[1, head, cell] = fades[position, head]
        torch.testing.assert_close(state.memory(1, length), expected[length])


def test_a_sequence_begins_with_zeros() -> None:
    assert torch.equal(lines(PERIOD).memory(0, 0), torch.zeros(HEADS.HV, HEADS.DK, HEADS.DV))


def test_what_was_just_written_is_copied() -> None:
    state = lines(PERIOD)
    state.written[0] = 5
    state.recurrent[0] = 1.0
    state.memory(0, 5).zero_()
    assert (state.recurrent[0] == 1).all()


def test_heads_share_out_the_channels() -> None:
    assert lines(PERIOD).heads == HEADS
    assert lines(3).period == 3


def test_bytes_of_a_decode_step() -> None:
    heads, state = Heads(16, 32, 128, 128), 32 * 128 * 128 * 4
    assert bytes_per_token(heads, LAZY_FROM - 1) == 2 * state
    entry = 32 * 257 * 4
    moved = [state + since * entry + (state if since == PERIOD - 1 else entry) for since in range(PERIOD)]
    assert bytes_per_token(heads, LAZY_FROM) == pytest.approx(sum(moved) / PERIOD)
