"""Parts of all ranks are the whole, in each format; what does not divide is refused."""

from dataclasses import replace

import pytest
import torch

from moe_nvfp4.cache import AttentionSpec, CacheSpec, DeltaSpec
from moe_nvfp4.errors import RequestError
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, NVFP4Tensor, encode_e4m3, quantize
from moe_nvfp4.safetensors_file import TensorInfo
from moe_nvfp4.sharding import Cut, cuts, delta_of_rank, heads_of_rank, kv_heads_of_rank
from moe_nvfp4.weight_source import WeightSource

DELTA = DeltaSpec((1,), channels=2 * 2 * 16 + 4 * 16, kernel=4, value_heads=4, key_dim=16, value_dim=16)
SPEC = CacheSpec((AttentionSpec((0,), kv_heads=2, head_dim=32),), DELTA)
SHAPES = {
    "layers.0.self_attn.q_proj.weight": (128, 64),
    "layers.0.self_attn.k_proj.weight": (64, 64),
    "layers.0.self_attn.v_proj.weight": (64, 64),
    "layers.0.self_attn.o_proj.weight": (64, 128),
    "layers.1.linear_attn.in_proj_qkv.weight": (128, 64),
    "layers.1.linear_attn.conv1d.weight": (128, 1, 4),
    "layers.1.linear_attn.A_log": (4,),
    "layers.1.linear_attn.out_proj.weight": (64, 64),
}
WHOLE = ("layers.0.self_attn.q_norm.weight", "layers.1.linear_attn.norm.weight", "layers.0.mlp.up_proj.weight")


def source(shape: tuple[int, ...], format: str = "plain") -> WeightSource:
    return WeightSource("weight", format, shape, TensorInfo("weight", 0, "BF16", shape, 0, 0))  # type: ignore[arg-type]


def cut(name: str, ranks: int, rank: int) -> Cut:
    return cuts({name: source(SHAPES[name])}, SPEC, ranks, rank)[name]


def test_each_rank_has_the_rows_of_its_heads() -> None:
    """Rows in heads of 32 (attention) and 16 (delta net), by number of the head."""
    assert [cut("layers.0.self_attn.q_proj.weight", 4, r).ranges for r in range(4)] == [
        ((32 * r, 32 * r + 32),) for r in range(4)
    ]
    shared = [cut("layers.0.self_attn.k_proj.weight", 4, r).ranges for r in range(4)]
    assert shared == [((0, 32),), ((0, 32),), ((32, 64),), ((32, 64),)]
    assert cut("layers.0.self_attn.o_proj.weight", 2, 1) == Cut(((64, 128),), columns=True)
    assert cut("layers.1.linear_attn.in_proj_qkv.weight", 2, 1).ranges == ((16, 32), (48, 64), (96, 128))
    assert cut("layers.1.linear_attn.conv1d.weight", 4, 2).ranges == ((16, 32), (48, 64), (96, 112))
    assert cut("layers.1.linear_attn.A_log", 4, 3).ranges == ((3, 4),)
    assert cuts({name: source((64, 64)) for name in WHOLE}, SPEC, 2, 0) == {}


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.weight", "layers.0.self_attn.o_proj.weight"])
@pytest.mark.parametrize("format", ["plain", "fp8", "fp8 rows", "nvfp4"])
def test_parts_are_the_whole(name: str, format: str) -> None:
    values = torch.randn(SHAPES[name])
    rows = 1 + torch.rand(len(values)) if format == "fp8 rows" else torch.tensor(0.5)
    weight = {
        "plain": lambda: values,
        "fp8": lambda: FP8Tensor(encode_e4m3(values), rows),
        "fp8 rows": lambda: FP8Tensor(encode_e4m3(values), rows),
        "nvfp4": lambda: quantize(values),
    }[format]()
    parts = [cut(name, 4, rank).of(weight) for rank in range(4)]
    for rank, part in enumerate(parts):
        assert tuple(part.shape) == cut(name, 4, rank).shape(SHAPES[name])

    def plain(part: torch.Tensor | FP8Tensor | NVFP4Tensor) -> torch.Tensor:
        return part if isinstance(part, torch.Tensor) else part.dequantize()

    axis = 1 if name.endswith("o_proj.weight") else 0
    assert torch.equal(torch.cat([plain(part) for part in parts], dim=axis), plain(weight))


def test_heads_that_cannot_be_shared_out() -> None:
    assert [heads_of_rank(8, n) for n in (1, 2, 8)] == [8, 4, 1]
    assert [kv_heads_of_rank(2, n) for n in (1, 2, 4, 8)] == [2, 1, 1, 1]
    with pytest.raises(RequestError, match="8 attention heads cannot be shared out evenly over 3 ranks; use a divisor"):
        heads_of_rank(8, 3)
    with pytest.raises(RequestError, match="6 key-value heads cannot be"):
        kv_heads_of_rank(6, 4)
    assert delta_of_rank(DELTA, 2) == replace(DELTA, channels=64, value_heads=2)
    assert delta_of_rank(DELTA, 4) == replace(DELTA, channels=48, value_heads=1)
    with pytest.raises(RequestError, match="4 value heads of delta nets"):
        delta_of_rank(DELTA, 8)


def test_blocks_that_would_be_cut_apart() -> None:
    name = "layers.0.self_attn.o_proj.weight"
    assert cuts({name: source((64, 96), "nvfp4")}, SPEC, 2, 1)[name].ranges == ((48, 96),)
    with pytest.raises(RequestError, match="weight: 96 columns over 4 ranks cut NVFP4 blocks of 16 apart"):
        cuts({name: source((64, 96), "nvfp4")}, SPEC, 4, 1)
