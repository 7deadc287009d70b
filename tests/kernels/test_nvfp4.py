import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_nvfp4.kernels import nvfp4
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, NVFP4Tensor, dequantize, quantize

RULES: tuple[nvfp4.Rule, ...] = ("modelopt", "compressed-tensors")
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
ALL_CODES = torch.arange(16, dtype=torch.uint8)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [
    (b % 8) * 2.0**-9 if b < 8 else (1 + (b % 8) / 8) * 2.0 ** (b // 8 - 7) for b in range(127)
]  # the finite magnitudes, by the definition of the format


def nearest(values: list[float], x: float) -> int:
    """Index of the value nearest to |x|; ties go to the even index, which is the even mantissa."""
    return min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))


def around_midpoints(values: list[float]) -> Tensor:
    """Every value, every midpoint between neighbours, and the floats next to each, with both signs."""
    points = torch.tensor(values + [(a + b) / 2 for a, b in pairwise(values)])
    infinity = torch.tensor(math.inf)
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    return torch.cat([points, -points])


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    return actual.dtype == expected.dtype and torch.equal(actual.view(as_int), expected.view(as_int))


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def adversarial() -> dict[str, Tensor]:
    outlier = gaussian(4, 48) * 1e-3
    outlier[2, 17] = 1000.0
    midpoints = around_midpoints(E2M1)
    boundaries = torch.cat([midpoints, torch.zeros(-len(midpoints) % 15)]).reshape(-1, 15)
    boundaries = torch.cat([boundaries, torch.full((len(boundaries), 1), 6.0)], dim=1)
    scale_boundaries = gaussian(127 * 3, 16).clamp(-1, 1)
    scale_boundaries[:, 5] = 6 * around_midpoints(E4M3)[: 127 * 3].abs()
    near_ties = gaussian(1024, 16).clamp(-1, 1) * 1e-6
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(E4M3[:120])] * 9)[:1024]
    near_ties[:, 3] = ties * (torch.tensor(2.9) / 2688) * 6  # rounded: on a tie or an ulp beside it
    near_ties[0, 3] = 2.9
    mixed = gaussian(8, 64)
    mixed[1, :16], mixed[3], mixed[5, 16:48] = 0.0, 0.0, -0.0
    return {
        "zeros": torch.zeros(3, 32),
        "negative zeros": torch.full((3, 32), -0.0),
        "some zero blocks": mixed,
        "lone outlier": outlier,
        "denormals": gaussian(4, 32) * 1e-40,
        "divisor overflows": gaussian(4, 32) * 1e-37,
        "huge": gaussian(4, 32).clamp(-3, 3) * 1e37,
        "e2m1 boundaries": boundaries,
        "e4m3 boundaries": scale_boundaries,
        "e4m3 near ties": near_ties,
        "huge range between blocks": gaussian(33, 48) * 2.0 ** torch.arange(-40, 26, 2)[:, None],
        "constant": torch.full((2, 16), 0.3),
        "negative only": -gaussian(4, 32).abs(),
        "one block": gaussian(1, 16),
        "one spike per block": torch.eye(16) * torch.linspace(-3, 5, 16),
        "K = 48": gaussian(5, 48),
        "K = 704": gaussian(7, 704) * 0.04,
        "K = 1856": gaussian(3, 1856) * 0.02,
        "not contiguous": gaussian(48, 6).T,
    }


CASES = tuple(adversarial())


# --- E4M3 and E2M1 ---


@pytest.mark.parametrize("decode", [nvfp4.decode_e4m3, nvfp4._decode_e4m3_bits])
def test_e4m3_decodes_every_bit_pattern(decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
    decoded = decode(ALL_BYTES)
    expected = ALL_BYTES.view(torch.float8_e4m3fn).float()
    number = ~expected.isnan()
    assert ALL_BYTES[~number].tolist() == [0x7F, 0xFF]
    assert decoded[~number].isnan().all()
    assert same_bits(decoded[number], expected[number])
    assert decoded[:127].tolist() == E4M3


def test_e4m3_round_trip() -> None:
    number = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]
    assert torch.equal(nvfp4.encode_e4m3(nvfp4.decode_e4m3(number)), number)
    assert nvfp4.encode_e4m3(torch.tensor(math.nan)).item() in (0x7F, 0xFF)


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    x = around_midpoints(E4M3)
    expected = [nearest(E4M3, v) | (0x80 if math.copysign(1, v) < 0 else 0) for v in x.tolist()]
    assert nvfp4.encode_e4m3(x).tolist() == expected
    beyond = torch.tensor([449.0, 464.0, 480.0, 1e30, math.inf])
    assert nvfp4.encode_e4m3(beyond).tolist() == [0x7E] * 5
    assert nvfp4.encode_e4m3(-beyond).tolist() == [0xFE] * 5


def test_e2m1_decodes_every_code() -> None:
    expected = torch.tensor(E2M1 + [-v for v in E2M1])
    assert same_bits(nvfp4.decode_e2m1(ALL_CODES), expected)
    assert nvfp4.encode_e2m1(expected).tolist() == [*range(8), 0, *range(9, 16)]  # -0.0 loses its sign
    packed = ALL_BYTES.view(8, 32)
    assert same_bits(nvfp4._decode_packed(packed), nvfp4.decode_e2m1(nvfp4.unpack(packed)))


def test_e2m1_rounds_to_nearest_even_and_saturates() -> None:
    x = around_midpoints(E2M1)
    expected = [nearest(E2M1, v) | (8 if v < 0 else 0) for v in x.tolist()]
    assert nvfp4.encode_e2m1(x).tolist() == expected
    special = torch.tensor([6.1, 1e30, math.inf, -math.inf, -1e-45, -0.25, -0.0, math.nan])
    assert nvfp4.encode_e2m1(special).tolist() == [7, 7, 7, 15, 8, 8, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_e2m1_takes_every_half_precision_value(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(nvfp4.encode_e2m1(x), nvfp4.encode_e2m1(x.float()))


def test_pack_puts_the_even_column_low() -> None:
    assert nvfp4.pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert torch.equal(nvfp4.pack(nvfp4.unpack(ALL_BYTES)), ALL_BYTES)
    codes = torch.randint(0, 16, (2, 3, 48), dtype=torch.uint8)
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)


# --- dequantisation ---


def random_quantised(*shape: int) -> NVFP4Tensor:
    *lead, n, k = shape
    codes = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 0x7F, (*lead, n, k // 16), dtype=torch.uint8)
    return NVFP4Tensor(codes, block_scales, torch.rand(lead) + 0.01)


def test_dequantize_is_the_formula() -> None:
    q = random_quantised(2, 3, 48)
    assert q.shape == (2, 3, 48)
    assert q.nbytes == 2 * 3 * (24 + 3) + 2 * 4
    codes, scales = nvfp4.unpack(q.codes).tolist(), q.block_scales.tolist()
    lut = E2M1 + [-v for v in E2M1]
    expected = [
        [[np.float32(lut[codes[e][n][k]] * E4M3[scales[e][n][k // 16]]) * g for k in range(48)] for n in range(3)]
        for e, g in enumerate(q.global_scale.numpy())
    ]
    assert same_bits(q.dequantize(), torch.tensor(np.array(expected)))
    assert same_bits(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


class LargestTensor(TorchDispatchMode):
    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_dequantize_works_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_quantised(3, 37, 64)
    whole = q.dequantize()
    for chunk in (1, 64, 1000):
        monkeypatch.setattr(nvfp4, "_DEQUANTIZE_CHUNK", chunk)
        assert same_bits(q.dequantize(), whole)
    q = random_quantised(4, 256, 64)
    with LargestTensor() as scratch:
        dequantize(q._replace(codes=q.codes[:1], block_scales=q.block_scales[:1], global_scale=q.global_scale[:1]))
    assert scratch.nbytes <= 256 * 64 * 4  # the result


def test_dequantize_reads_strided_parts() -> None:
    q = random_quantised(2, 6, 64)
    part = NVFP4Tensor(q.codes[:, ::2, :16], q.block_scales[:, ::2, :2], q.global_scale)
    assert torch.equal(part.dequantize(), q.dequantize()[:, ::2, :32])


@pytest.mark.parametrize("scale", [torch.tensor(0.37), torch.tensor([0.5, 3.0, 1e-3])])
def test_fp8_dequantize(scale: Tensor) -> None:
    weight = gaussian(3, 40) * 9
    q = FP8Tensor(nvfp4.encode_e4m3(weight), scale)
    assert q.shape == (3, 40)
    assert q.nbytes == 3 * 40 + 4 * scale.numel()
    assert same_bits(q.dequantize(), weight.to(torch.float8_e4m3fn).float() * scale.reshape(-1, 1))


# --- quantisation ---


def scalar_modelopt(weight: Tensor) -> tuple[list[list[int]], list[list[int]], np.float32]:
    """CHECKPOINTS.md 3.2 for one float32 matrix, number by number."""
    f32 = np.float32
    rows = weight.numpy()
    amax = max(abs(v) for row in rows for v in row)
    scale_2 = f32(amax) / f32(6 * 448)
    packed, scales = [], []
    for row in rows:
        codes, row_scales = [], []
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            block_amax = max(abs(v) for v in block)
            scale = block_amax / (f32(6) * scale_2) if block_amax else f32(1)
            bits = nearest(E4M3, min(max(float(scale), 2.0**-9), 448.0))
            row_scales.append(bits)
            step = f32(E4M3[bits]) * scale_2
            codes += [nearest(E2M1, v / step) + 8 * bool(v < 0) if step else 0 for v in block]
        packed.append([odd << 4 | even for even, odd in zip(codes[::2], codes[1::2], strict=True)])
        scales.append(row_scales)
    return packed, scales, scale_2


@pytest.mark.parametrize("case", CASES)
def test_modelopt_rule(case: str) -> None:
    weight = adversarial()[case]
    q = quantize(weight, rule="modelopt")
    with np.errstate(all="ignore"):
        packed, scales, scale_2 = scalar_modelopt(weight)
    assert q.global_scale.item() == scale_2
    assert q.block_scales.tolist() == scales
    assert q.codes.tolist() == packed


def test_modelopt_scales() -> None:
    weight = torch.zeros(1, 48)
    weight[0, 0], weight[0, 16] = 2688.0, 1e-9
    q = quantize(weight)
    assert q.global_scale.item() == 1.0
    # 448; the smallest subnormal, where 1e-9 would have given zero; 1.0 for a block of zeros
    assert nvfp4.decode_e4m3(q.block_scales).tolist() == [[448.0, 2.0**-9, 1.0]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_matrix_has_its_own_global_scale(rule: nvfp4.Rule, dtype: torch.dtype) -> None:
    weight = (gaussian(2, 3, 4, 48) * torch.logspace(-1, 1, 6).reshape(2, 3, 1, 1)).to(dtype)
    q = quantize(weight, rule=rule)
    assert q.global_scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = quantize(weight[i, j], rule=rule)
            assert all(torch.equal(part[i, j], one) for part, one in zip(q, alone, strict=True))
    assert nvfp4.relative_error(q.dequantize(), weight) < nvfp4.TOLERANCE["nvfp4"]


def test_shared_global_scale() -> None:
    gate, up = gaussian(8, 32), gaussian(8, 32) * 3
    amax = torch.maximum(nvfp4.tensor_amax(gate), nvfp4.tensor_amax(up))
    both = torch.cat([gate, up])
    multiplier, divisor = nvfp4.global_scale_modelopt(amax), nvfp4.global_scale_compressed_tensors(amax)
    for rule, shared in (("modelopt", multiplier), ("compressed-tensors", divisor)):
        whole = quantize(both, rule=rule)  # type: ignore[arg-type]
        part = quantize(gate, global_scale=shared, rule=rule)  # type: ignore[arg-type]
        assert torch.equal(part.codes, whole.codes[:8])
        assert torch.equal(part.block_scales, whole.block_scales[:8])
        assert torch.equal(part.global_scale, whole.global_scale)


def test_compressed_tensors_divisor_falls_back_to_one() -> None:
    amax = torch.tensor([0.0, 1e-40, math.nan, 2688.0, 6.0])
    torch.testing.assert_close(nvfp4.global_scale_compressed_tensors(amax), torch.tensor([1.0, 1.0, 1.0, 1.0, 448.0]))


floats = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)
weights = st.lists(floats, min_size=64, max_size=64).map(lambda v: torch.tensor(v).reshape(2, 32))
small = st.floats(min_value=-16, max_value=16, width=16)
small_weights = st.lists(small, min_size=64, max_size=64).map(lambda v: torch.tensor(v).reshape(2, 32))


@given(weight=weights | small_weights, rule=st.sampled_from(RULES))
def test_error_of_a_block_is_bounded_by_its_scale(weight: Tensor, rule: nvfp4.Rule) -> None:
    # At most one step (half of 6 - 4) where the block scale is a normal number; where it is subnormal,
    # rounding it moved amax by up to 6 * 2^-10.
    if 0 < weight.abs().max() < 2.0**-100:
        weight = weight * 2.0**80  # keeps the global scale a normal float32
    q = quantize(weight, rule=rule)
    error = (q.dequantize() - weight).abs().reshape(2, 2, 16).amax(-1)
    scale = nvfp4.decode_e4m3(q.block_scales)
    bound = torch.maximum(scale, torch.tensor(6 * 2.0**-10)) * q.global_scale
    assert (error <= bound * 1.001).all()


@given(weight=weights | small_weights, rule=st.sampled_from(RULES))
def test_quantising_again_changes_nothing(weight: Tensor, rule: nvfp4.Rule) -> None:
    divisor = nvfp4.global_scale_compressed_tensors(nvfp4.tensor_amax(weight))
    first = quantize(weight, rule=rule)
    shared = first.global_scale if rule == "modelopt" else divisor
    if not 2.0**-100 < first.global_scale <= 2.0**100:
        return
    second = quantize(first.dequantize(), global_scale=shared, rule=rule)
    normal = (first.block_scales >= 8)[..., None]  # a subnormal scale may be off by a third and saturate codes
    zero = first.dequantize().reshape(2, 2, 16).abs().amax(-1) == 0  # its scale is the rule's placeholder
    values, again = (nvfp4.decode_e2m1(nvfp4.unpack(q.codes)).reshape(2, 2, 16) for q in (first, second))
    assert torch.equal(values * normal, again * normal)  # as numbers: a code for -0.0 comes back as 0.0
    keep = normal[..., 0] & ~zero
    assert torch.equal(first.block_scales[keep], second.block_scales[keep])


@pytest.mark.parametrize("rule", RULES)
def test_tolerances_fit_their_formats(rule: nvfp4.Rule) -> None:
    weight = gaussian(64, 512) * 0.03
    errors = {
        "bfloat16": nvfp4.relative_error(weight.bfloat16(), weight),
        "fp8": nvfp4.relative_error(
            FP8Tensor(nvfp4.encode_e4m3(weight / weight.abs().max() * 448), weight.abs().max() / 448).dequantize(),
            weight,
        ),
        "nvfp4": nvfp4.relative_error(quantize(weight, rule=rule).dequantize(), weight),
    }
    for name, error in errors.items():
        assert 0.2 * nvfp4.TOLERANCE[name] < error < nvfp4.TOLERANCE[name], name
    assert nvfp4.relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert nvfp4.relative_error(torch.ones(3), torch.zeros(3)) == math.inf


# --- against compressed-tensors ---


class CompressedTensors:
    """One weight through that package's own calibration arithmetic, compressor and decompressor."""

    def __init__(self) -> None:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import NVFP4A16
        from compressed_tensors.quantization.utils import helpers

        self.compressor, self.helpers = NVFP4PackedCompressor, helpers
        self.scheme = QuantizationScheme(targets=["Linear"], **NVFP4A16)

    def compress(self, weight: Tensor, divisor: Tensor | None = None) -> dict[str, Tensor]:
        if divisor is None:
            divisor = self.helpers.generate_gparam(weight.amin(), weight.amax())
        blocks = weight.reshape(len(weight), -1, 16)
        scale, _ = self.helpers.calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), self.scheme.weights, global_scale=divisor
        )
        # A module keeps its weight_scale in the dtype of its weight.
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_global_scale": divisor}
        compressed: dict[str, Tensor] = self.compressor.compress(state, self.scheme)
        return compressed

    def decompress(self, state: dict[str, Tensor]) -> Tensor:
        weight: Tensor = self.compressor.decompress(state, self.scheme)["weight"]
        return weight


@pytest.fixture(scope="module")
def ct() -> CompressedTensors:
    return CompressedTensors()


def assert_equals_package(ct: CompressedTensors, weight: Tensor, divisor: Tensor | None = None) -> None:
    state = ct.compress(weight, None if divisor is None else divisor.reshape(1))
    ours = quantize(weight, global_scale=divisor, rule="compressed-tensors")
    if divisor is None:
        divisor = nvfp4.global_scale_compressed_tensors(nvfp4.tensor_amax(weight))
    assert same_bits(divisor.reshape(1), state["weight_global_scale"])
    assert same_bits(ours.global_scale, 1 / divisor)
    assert same_bits(ours.block_scales, state["weight_scale"].view(torch.uint8))
    assert same_bits(ours.codes, state["weight_packed"])
    assert same_bits(dequantize(ours, torch.bfloat16, divisor=divisor), ct.decompress(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_equals_compressed_tensors(ct: CompressedTensors, case: str, dtype: torch.dtype) -> None:
    weight = adversarial()[case].to(dtype)
    if weight.isfinite().all():
        assert_equals_package(ct, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_compressed_tensors_on_random_tensors(ct: CompressedTensors, dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        assert_equals_package(ct, (gaussian(64, 208) * 10.0 ** (seed % 7 - 5)).to(dtype))


@pytest.mark.parametrize("divisor", [1.0, 448.0, 3.0, 1e-3, 1e6])
def test_equals_compressed_tensors_under_a_shared_scale(ct: CompressedTensors, divisor: float) -> None:
    # With divisors 1 and 448 the boundaries meet their ties exactly; 1e6 saturates the block scales.
    for weight in adversarial().values():
        assert_equals_package(ct, weight, torch.tensor(divisor))


@given(weight=weights | small_weights, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_compressed_tensors_on_any_floats(weight: Tensor, dtype: torch.dtype) -> None:
    assert_equals_package(CompressedTensors(), weight.to(dtype))


def test_multiplier_is_as_good_as_the_divisor(ct: CompressedTensors) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize

    weight = gaussian(64, 704) * 0.04
    state = ct.compress(weight)
    ours = quantize(weight, rule="compressed-tensors")
    theirs = their_dequantize(
        nvfp4.decode_e2m1(nvfp4.unpack(ours.codes)),
        state["weight_scale"].float(),
        args=ct.scheme.weights,
        dtype=torch.float32,
        global_scale=state["weight_global_scale"],
    )
    assert same_bits(dequantize(ours, divisor=state["weight_global_scale"][0]), theirs)
    # two roundings on either side, each of half an ulp
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=2.0**-22, atol=0.0)


# --- errors ---


@pytest.mark.parametrize("shape", [(16,), (4, 8), (4, 24), (4, 0), (0, 16)])
def test_quantize_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize(torch.zeros(shape))


def test_quantize_refuses_what_it_cannot_represent() -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        quantize(torch.zeros(2, 16, dtype=torch.float64))
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.zeros(2, 16)
        weight[1, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(weight)
    with pytest.raises(ValueError, match="rule is 'mx'"):
        quantize(torch.zeros(2, 16), rule="mx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reshape a stored \[1\]"):
        quantize(torch.zeros(2, 16), global_scale=torch.ones(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": torch.zeros(2, 3, 24)}, "codes has dtype"),
        ({"codes": torch.zeros(24, dtype=torch.uint8)}, "N, K/2"),
        ({"codes": torch.zeros(2, 3, 12, dtype=torch.uint8)}, "N, K/2"),
        ({"codes": torch.zeros(2, 3, 32, dtype=torch.uint8)}, "one per 16 columns"),
        ({"block_scales": torch.zeros(2, 3, 3).to(torch.float8_e4m3fn)}, r"\.view\(torch\.uint8\)"),
        ({"block_scales": torch.zeros(3, 3, dtype=torch.uint8)}, "one per 16 columns"),
        ({"global_scale": torch.ones(2, dtype=torch.bfloat16)}, "global_scale has dtype"),
        ({"global_scale": torch.ones(2, 1)}, "one per matrix"),
    ],
)
def test_dequantize_refuses_parts_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize(random_quantised(2, 3, 48)._replace(**change))


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="K must be even"):
        nvfp4.pack(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divisor has shape"):
        dequantize(random_quantised(2, 16), divisor=torch.ones(1))
    values = torch.zeros(3, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[1\] or \[N, 1\]"):
        FP8Tensor(values, torch.ones(3, 1)).dequantize()
    with pytest.raises(ValueError, match="values has dtype"):
        FP8Tensor(values.view(torch.float8_e4m3fn), torch.ones(())).dequantize()
