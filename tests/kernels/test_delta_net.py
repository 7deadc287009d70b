"""The twin against the definition in float64 and against transformers; both ways of computing a row agree."""

import pytest
import torch
from delta_cases import DECODES, EPS, SMALL, STEPS, TAPS, check, check_lines, copy, layer, reference
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from moe_nvfp4.kernels.delta_net import DeltaInputs, DeltaWeights, delta_net
from moe_nvfp4.kernels.delta_state import DeltaState, Heads
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rows import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
def test_twin(step: str, dtype: torch.dtype) -> None:
    check(SMALL, STEPS[step], dtype, TOLERANCE["float32" if dtype == torch.float32 else "bfloat16"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twin_keeps_lines(dtype: torch.dtype) -> None:
    check_lines(SMALL, dtype)


def test_twin_in_float64() -> None:
    case = layer(SMALL, STEPS["mixed"], torch.float64)
    case = case._replace(state=case.state._replace(recurrent=case.state.recurrent.double()))
    expected, _ = reference(case, STEPS["mixed"])
    actual = delta_net(*case.inputs, case.weights, case.state, Rows.of(STEPS["mixed"]), EPS)
    assert actual.dtype == torch.float64
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("cut", [1, 2, 3, 40, 65])
def test_a_prompt_in_two_pieces(cut: int) -> None:
    count = 67
    whole = layer(SMALL, [(0, 0, count)], torch.float32)
    state = copy(whole.state)
    expected = delta_net(*whole.inputs, whole.weights, whole.state, Rows.of([(0, 0, count)]), EPS)
    pieces = []
    for begin, end in ((0, cut), (cut, count)):
        part = DeltaInputs(*(x[begin:end] for x in whole.inputs))
        pieces.append(delta_net(*part, whole.weights, state, Rows.of([(0, begin, end - begin)]), EPS))
    assert relative_error(torch.cat(pieces), expected) < TOLERANCE["float32"]
    assert relative_error(state.recurrent, whole.state.recurrent) < TOLERANCE["float32"]
    assert torch.equal(state.conv, whole.state.conv)


def test_sequences_do_not_touch_each_other() -> None:
    case = layer(SMALL, DECODES, torch.float32)
    state = copy(case.state)
    together = delta_net(*case.inputs, case.weights, case.state, Rows.of(DECODES), EPS)
    for row, piece in enumerate(DECODES):
        part = DeltaInputs(*(x[row : row + 1] for x in case.inputs))
        alone = delta_net(*part, case.weights, state, Rows.of([piece]), EPS)
        assert torch.equal(alone[0], together[row])
    for one, other in zip(state, case.state, strict=True):
        assert torch.equal(one.nan_to_num(99.0), other.nan_to_num(99.0))


def test_like_transformers() -> None:
    heads = Heads(2, 4, 32, 16)
    config = Qwen3_5MoeTextConfig(
        hidden_size=48, linear_num_key_heads=heads.HK, linear_num_value_heads=heads.HV,
        linear_key_head_dim=heads.DK, linear_value_head_dim=heads.DV, linear_conv_kernel_dim=TAPS, rms_norm_eps=EPS,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    module = Qwen3_5MoeGatedDeltaNet(config, 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    weights = DeltaWeights(
        module.conv1d.weight[:, 0].detach(), -module.A_log.detach().exp(), module.dt_bias.detach(),
        module.norm.weight.detach(),
    )  # fmt: skip
    x = torch.randn(100, 48)
    with torch.no_grad():
        expected = module(x[None])[0]
        projections = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
        inputs = DeltaInputs(*(projection(x) for projection in projections))
        state = DeltaState.empty((1,), heads, TAPS, torch.float32)
        outputs = []
        for begin, end in ((0, 90), (90, 99), (99, 100)):
            part = DeltaInputs(*(y[begin:end] for y in inputs))
            outputs.append(delta_net(*part, weights, state, Rows.of([(0, begin, end - begin)]), EPS))
        assert relative_error(module.out_proj(torch.cat(outputs)), expected) < TOLERANCE["float32"]
