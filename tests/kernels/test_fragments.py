"""The layout for tensor cores: its inverse, its order of columns, and the repack in place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_nvfp4.kernels.fragments import (
    decode_scales,
    fragment_columns,
    from_fragments,
    repack_in_place,
    to_fragments,
)
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor, decode_e2m1, dequantize

SHAPES = [(2, 32, 128), (1, 16, 64), (3, 48, 192), (1, 64, 704), (1, 32, 1856)]


def weight(experts: int, rows: int, columns: int, device: str = "cpu") -> NVFP4Tensor:
    """Random, with block scales of zero, minus zero and every subnormal."""
    torch.manual_seed(rows + columns)
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (experts, rows, columns // 16), dtype=torch.uint8)
    scales[0, :, 0] = torch.arange(rows) % 8
    scales[0, 1, -1] = 0x80
    return NVFP4Tensor(codes.to(device), scales.to(device), torch.rand(experts, device=device))


def test_inverse_and_padding() -> None:
    for experts, rows, columns in [*SHAPES, (2, 5, 48), (1, 2, 16)]:
        before = weight(experts, rows, columns)
        after = from_fragments(to_fragments(before))
        assert after.codes.shape[-2] % 16 == 0
        assert after.shape[-1] % 64 == 0
        values = dequantize(after)
        n, k = before.shape[-2:]
        assert torch.equal(values[:, :n, :k], dequantize(before))
        assert values[:, n:].count_nonzero() == 0
        assert values[..., k:].count_nonzero() == 0


def test_a_lane_holds_what_the_layout_says() -> None:
    """Word by word and bit by bit, from the table in the module's docstring."""
    before = weight(1, 32, 128)
    fragments = to_fragments(before)
    plain = decode_e2m1(torch.stack((before.codes & 15, before.codes >> 4), -1).flatten(-2))[0]
    signs, magnitudes = (15, 12, 13, 14), (6, 3, 0, 9)
    for s, t, r, c, j in [(0, 0, 0, 0, 0), (1, 1, 7, 3, 3), (0, 1, 3, 2, 1), (1, 0, 5, 1, 2)]:
        word = int(fragments.words[0, s, t, r, c, j]) & 0xFFFFFFFF
        for i0 in range(2):
            half = word >> (16 * i0) & 0xFFFF
            for code in range(4):
                i1, i2 = code % 2, code // 2
                n, k = 16 * s + 8 * i1 + r, 64 * t + 16 * c + 4 * j + 2 * i2 + i0
                bits = (half >> signs[code] & 1) << 3 | (half >> magnitudes[code] & 7)
                if before.block_scales[0, n, k // 16] & 0x7F:
                    assert decode_e2m1(torch.tensor([bits], dtype=torch.uint8)) == plain[n, k]
                else:
                    assert bits == 0


def test_columns_are_a_permutation_within_each_tile() -> None:
    columns = fragment_columns(192)
    assert torch.equal(columns.sort().values, torch.arange(192))
    assert torch.equal(columns // 64, torch.arange(192) // 64)
    # The operand's k of an mma step j: (i2, c, i0).
    assert columns[:4].tolist() == [0, 1, 16, 17]
    assert columns[8:10].tolist() == [2, 3]
    assert columns[16:18].tolist() == [4, 5]


def test_every_scale_survives() -> None:
    scales = torch.arange(0x7F, dtype=torch.uint8).repeat(16, 1)[:, :64].contiguous()
    before = NVFP4Tensor(torch.full((16, 512), 0x22, dtype=torch.uint8), scales, torch.tensor(1.0))
    assert torch.equal(from_fragments(to_fragments(before)).block_scales, scales)
    assert float(decode_scales(torch.tensor([8], dtype=torch.uint8))) == 2.0**-9


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (128, 768, 2048), (16, 2816, 704), (4, 1536, 4096)])
def test_repack_in_place_on_a_gpu(shape: tuple[int, int, int]) -> None:
    before = weight(*shape, device="cuda")
    expected = to_fragments(before)
    place = before.codes.data_ptr()
    after = repack_in_place(before)
    assert after.words.data_ptr() == place
    assert torch.equal(after.words, expected.words)
    assert torch.equal(after.scales, expected.scales)


def test_repack_in_place_in_the_interpreter() -> None:
    code = """
from test_fragments import *
for shape in SHAPES:
    before = weight(*shape)
    expected = to_fragments(before)
    after = repack_in_place(before)
    assert torch.equal(after.words, expected.words) and torch.equal(after.scales, expected.scales)
"""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


def test_a_shape_that_needs_padding_is_refused_in_place() -> None:
    with pytest.raises(ValueError, match="rows in 16s"):
        repack_in_place(weight(1, 8, 64))
