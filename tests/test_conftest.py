"""The poisoning that the other tests rely on."""

import pytest
import torch

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("poisoned_memory")
def test_floats_start_as_nan(dtype: torch.dtype, device: str) -> None:
    like = torch.zeros(2, 3, device=device).to(dtype)
    for tensor in (
        torch.empty(2, 3, dtype=dtype, device=device),
        torch.empty_like(like),
        like.new_empty(2, 3),
        torch.empty_strided((2, 3), (4, 1), dtype=dtype, device=device),
    ):
        assert tensor.dtype == dtype
        assert tensor.shape == (2, 3)
        assert tensor.float().isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("poisoned_memory")
def test_integers_start_as_a_pattern(device: str) -> None:
    assert torch.empty(4, dtype=torch.uint8, device=device).eq(0x7F).all()
    assert torch.empty(4, dtype=torch.int64, device=device).eq(0x7F7F7F7F7F7F7F7F).all()
    assert torch.empty(0, dtype=torch.int32, device=device).numel() == 0


@pytest.mark.usefixtures("poisoned_memory")
def test_given_storage_is_left_alone() -> None:
    out = torch.ones(3)
    assert torch.empty(3, out=out) is out
    assert out.eq(1).all()
    assert torch.empty(3, device="meta").device.type == "meta"
