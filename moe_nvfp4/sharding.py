"""Attention and delta-net heads shared out over ranks: which rows or columns of a weight a rank keeps.

Rows of q, k, v, gates, convolutions and decays belong to heads; so do columns of the projections that take what heads
give, whose outputs are summed over ranks. Where there are fewer key-value or key heads than ranks, neighbouring ranks
keep the same one. Norms over a head's size, embeddings, dense and shared-expert MLPs and the output head stay whole on
every rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from moe_nvfp4.cache import CacheSpec, DeltaSpec
from moe_nvfp4.errors import RequestError
from moe_nvfp4.kernels.linear import DenseWeight
from moe_nvfp4.kernels.nvfp4 import BLOCK, FP8Tensor, NVFP4Tensor
from moe_nvfp4.weight_source import WeightSource

_WHOLE: Final = ("q_norm", "k_norm", "norm")


def heads_of_rank(heads: int, ranks: int, what: str = "attention heads") -> int:
    if heads % ranks:
        raise RequestError(
            f"attention tensor: {heads} {what} cannot be shared out evenly over {ranks} ranks; use a divisor of "
            f"{heads} as the number of ranks, or attention replicated or data"
        )
    return heads // ranks


def kv_heads_of_rank(heads: int, ranks: int, what: str = "key-value heads") -> int:
    """One where there are fewer heads than ranks."""
    return 1 if heads < ranks and ranks % heads == 0 else heads_of_rank(heads, ranks, what)


def delta_of_rank(delta: DeltaSpec, ranks: int) -> DeltaSpec:
    keys = kv_heads_of_rank(delta.heads.HK, ranks, "key heads of delta nets")
    values = heads_of_rank(delta.value_heads, ranks, "value heads of delta nets")
    channels = 2 * keys * delta.key_dim + values * delta.value_dim
    return replace(delta, channels=channels, value_heads=values)


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank keeps of a weight: ranges of rows, or one of columns."""

    ranges: tuple[tuple[int, int], ...]
    columns: bool = False

    @property
    def kept(self) -> int:
        return sum(end - begin for begin, end in self.ranges)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], self.kept) if self.columns else (self.kept, *shape[1:])

    def of(self, weight: DenseWeight) -> DenseWeight:
        """A copy, so that the whole can go."""
        if isinstance(weight, torch.Tensor):
            return self._slice(weight)
        if isinstance(weight, FP8Tensor):
            rows = weight.scale.ndim and not self.columns
            return FP8Tensor(self._slice(weight.values), self._slice(weight.scale) if rows else weight.scale)
        assert isinstance(weight, NVFP4Tensor), "cut before the weight is re-ordered"
        return NVFP4Tensor(self._slice(weight.codes, 2), self._slice(weight.block_scales, BLOCK), weight.global_scale)

    def _slice(self, tensor: torch.Tensor, columns_each: int = 1) -> torch.Tensor:
        """`columns_each`: columns of the weight in one of the tensor's."""
        if self.columns:
            ((begin, end),) = self.ranges
            return tensor[:, begin // columns_each : end // columns_each].clone()
        return torch.cat([tensor[begin:end] for begin, end in self.ranges])


def cuts(dense: Mapping[str, WeightSource], spec: CacheSpec, ranks: int, rank: int) -> dict[str, Cut]:
    """By name, of the weights that this rank keeps a part of. `spec` is that of the whole model."""
    kv_heads = {layer: group.kv_heads for group in spec.attention for layer in group.layers}
    found = {}
    for name, source in dense.items():
        _, _, below = name.partition("layers.")
        layer, _, place = below.partition(".")
        module, _, part = place.partition(".")
        part = part.removesuffix(".weight")
        if module not in ("self_attn", "linear_attn") or part in _WHOLE:
            continue
        if module == "self_attn":
            cut = _attention_cut(part, source.shape, kv_heads[int(layer)], ranks, rank)
        else:
            assert spec.delta is not None
            cut = _delta_cut(part, source.shape, spec.delta, ranks, rank)
        assert cut is not None, f"{name}: unknown which of its rows belong to a head"
        if cut.columns and source.format == "nvfp4" and any(edge % BLOCK for edge in cut.ranges[0]):
            raise RequestError(
                f"attention tensor: {source.name}: {source.shape[1]} columns over {ranks} ranks cut NVFP4 blocks of "
                f"{BLOCK} apart; use fewer ranks, or attention replicated or data"
            )
        found[name] = cut
    return found


def shard(weights: dict[str, DenseWeight], wanted: Mapping[str, Cut]) -> None:
    """One after the other, so that little is held twice."""
    for name, cut in wanted.items():
        weights[name] = cut.of(weights.pop(name))


def sharded_sources(dense: Mapping[str, WeightSource], wanted: Mapping[str, Cut]) -> Iterable[WeightSource]:
    """What a rank keeps, as the memory plan counts it."""
    for name, source in dense.items():
        yield replace(source, shape=wanted[name].shape(source.shape)) if name in wanted else source


def _attention_cut(part: str, shape: tuple[int, ...], kv_heads: int, ranks: int, rank: int) -> Cut | None:
    if part == "q_proj":  # with a gate for each head, where there is one
        return Cut((_range(shape[0], ranks, ranks, rank),))
    if part in ("k_proj", "v_proj"):
        return Cut((_range(shape[0], kv_heads, ranks, rank),))
    if part == "o_proj":
        return Cut((_range(shape[1], ranks, ranks, rank),), columns=True)
    return None


def _delta_cut(part: str, shape: tuple[int, ...], delta: DeltaSpec, ranks: int, rank: int) -> Cut | None:
    if part in ("in_proj_qkv", "conv1d"):
        key_heads, values = delta.heads.HK, delta.value_heads * delta.value_dim
        keys = key_heads * delta.key_dim
        begin, end = _range(keys, key_heads, ranks, rank)
        first, last = _range(values, delta.value_heads, ranks, rank)
        return Cut(((begin, end), (keys + begin, keys + end), (2 * keys + first, 2 * keys + last)))
    if part in ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        return Cut((_range(shape[0], delta.value_heads, ranks, rank),))
    if part == "out_proj":
        return Cut((_range(shape[1], delta.value_heads, ranks, rank),), columns=True)
    return None


def _range(count: int, heads: int, ranks: int, rank: int) -> tuple[int, int]:
    """The rows of this rank's heads, or of the one that it shares with its neighbours."""
    parts = min(heads, ranks)
    part = rank * parts // ranks
    return count * part // parts, count * (part + 1) // parts
