"""The same numbers as Triton's own."""

import triton

from moe_nvfp4.kernels.sizes import cdiv, next_power_of_2


def test_as_triton_has_them() -> None:
    assert [next_power_of_2(n) for n in range(1, 5000)] == [triton.next_power_of_2(n) for n in range(1, 5000)]
    pairs = [(a, b) for a in (0, 1, 63, 64, 65, 4096, 2**33 + 1) for b in (1, 7, 64, 1000)]
    assert [cdiv(*pair) for pair in pairs] == [triton.cdiv(*pair) for pair in pairs]
