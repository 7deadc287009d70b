"""`ExpertBuffers`: per layer one contiguous block per projection, allocated once and filled by streaming.

    codes [E_local, N, K/2] uint8    block scales [E_local, N, K/16] uint8, E4M3 bits    global scales [E_local]

On a GPU the same bytes are re-ordered in place for the tensor-core kernels (kernels/fragments.py).

Every expert keeps its own gate, up and down global scales: merging them gives wrong answers on real files.
"""

import ctypes
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.kernels.fragments import fits_in_place, repack_in_place
from moe_nvfp4.kernels.nvfp4 import BLOCK, NVFP4Tensor
from moe_nvfp4.kernels.routed_experts import ExpertWeight
from moe_nvfp4.layouts.base import ExpertBlock, Layout
from moe_nvfp4.progress import Progress
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.tables import PlacementTables
from moe_nvfp4.safetensors_file import TensorInfo
from moe_nvfp4.scales import E4M3_NAN, as_multiplier, block_scale_stats, check_block_scales, global_multiplier
from moe_nvfp4.streaming import DEFAULT_READERS, Transfer, stream
from moe_nvfp4.survey import Survey, survey
from moe_nvfp4.weight_source import WeightSource, normalise

TRIM_BYTES = 4 << 20


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer on this rank, by slot. `gate` is None where experts have no gate projection."""

    gate: ExpertWeight | None
    up: ExpertWeight
    down: ExpertWeight

    @property
    def projections(self) -> tuple[ExpertWeight | None, ExpertWeight, ExpertWeight]:
        return self.gate, self.up, self.down

    def in_fragments(self) -> "LayerExperts":
        """The same memory in the order that the tensor-core kernels read; as it is where a shape does not fit them."""
        blocks = [block for block in self.projections if isinstance(block, NVFP4Tensor)]
        if not all(fits_in_place(*block.shape[-2:]) for block in blocks):
            return self
        *gate, up, down = (repack_in_place(block) for block in blocks)
        return LayerExperts(gate[0] if gate else None, up, down)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.projections if block is not None)


class ExpertBuffers:
    """All routed experts of one rank. Build with `load` or `from_experts`."""

    def __init__(
        self, layers: Mapping[int, LayerExperts], placement: Placement, rank: int, *, count_rows: bool = False
    ):
        """`count_rows`: `tables` keep the number of rows that each expert takes."""
        self.layers, self.rank = layers, rank
        device = next((layer.up.global_scale.device for layer in layers.values()), torch.device("cpu"))
        self.tables = PlacementTables(placement, rank, device, count=count_rows)
        self.down_scales: dict[int, torch.Tensor] = {}

    @property
    def placement(self) -> Placement:
        """As it is now; it may be replaced between steps."""
        return self.tables.placement

    def scale_down(self, layer: int, scale_E: torch.Tensor) -> None:
        """Multiplies what each logical expert of a layer gives. It goes into the global scale of the last projection,
        where it costs nothing, also of experts that come into the buffers later."""
        self.down_scales[layer] = scale_E = scale_E.float()
        here = torch.tensor(self.placement.local(layer, self.rank), dtype=torch.long, device=scale_E.device)
        self.layers[layer].down.global_scale.mul_(scale_E[here])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        found: Survey,
        *,
        device: torch.device | str,
        placement: Placement | None = None,
        rank: int = 0,
        fragments: bool = False,
        count_rows: bool = False,
        readers: int = DEFAULT_READERS,
        progress: bool | None = None,
    ) -> "ExpertBuffers":
        """Streams this rank's experts from the files; no byte of another rank's experts is read.

        Scales are checked first, so a broken export fails before the buffers are allocated. `fragments`, on a GPU,
        re-orders each layer in place for the tensor-core kernels.
        """
        placement = placement or Placement.even(found.experts, num_experts(found.layout))
        wanted = {layer: placement.local(layer, rank) for layer in found.experts}
        layers = load_experts(
            checkpoint, found, wanted, device=device, fragments=fragments, readers=readers, progress=progress
        )
        return cls(layers, placement, rank, count_rows=count_rows)

    @classmethod
    def from_experts(
        cls,
        tensors: MutableMapping[str, torch.Tensor],
        layout: Layout,
        *,
        device: torch.device | str | None = None,
        placement: Placement | None = None,
        rank: int = 0,
    ) -> "ExpertBuffers":
        """Builds the buffers from per-expert tensors in memory, under their checkpoint names, either dialect.

        Everything is checked first. Then each original is taken out of `tensors` as soon as its slot holds it,
        so as long as nothing else holds the originals the peak is the final size plus one projection of a
        layer. What is not of a routed expert stays where it is.
        """
        placement = placement or Placement.even((b.layer for b in layout.experts), num_experts(layout))
        prefixes = tuple(normalise(block.prefix + "0.").removesuffix("0.") for block in layout.experts)
        infos = {n: describe(n, t) for n, t in tensors.items() if normalise(n).startswith(prefixes)}
        found = survey(infos, Layout(layout.model_type, {}, layout.experts, layout.cache))
        found.require_complete("expert tensors in memory")
        flat = [s for projections in found.experts.values() for part in projections.values() for s in part]
        require_nvfp4(flat)
        multipliers = _check_in_memory(flat, tensors)
        layers = {}
        for block in layout.experts:
            blocks = {}
            for name, shape in block.projections.items():
                sources = found.experts[block.layer][name]
                local = placement.local(block.layer, rank)
                kept = [sources[expert] for expert in local]
                where = device or tensors[sources[0].weight.name].device
                for expert in set(range(block.count)).difference(local):
                    for info in sources[expert].tensors:
                        del tensors[info.name]
                blocks[name] = _allocate(shape, [multipliers[source.name] for source in kept], where)
                _move(blocks[name], kept, tensors)
            layers[block.layer] = _layer(blocks)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # small originals leave holes that a block of a layer does not fit
        for name in infos:
            tensors.pop(name, None)  # global and input scales
        return cls(layers, placement, rank)


def load_experts(
    checkpoint: Checkpoint,
    found: Survey,
    wanted: Mapping[int, Sequence[int]],
    *,
    device: torch.device | str,
    fragments: bool,
    readers: int = DEFAULT_READERS,
    progress: bool | None = None,
) -> dict[int, LayerExperts]:
    """Some experts of some layers, in the order of `wanted`. No byte of others is read."""
    found.require_complete(str(checkpoint.folder))
    local = {
        layer: {name: [sources[e] for e in experts] for name, sources in found.experts[layer].items()}
        for layer, experts in wanted.items()
    }
    flat = [source for projections in local.values() for sources in projections.values() for source in sources]
    require_nvfp4(flat)
    globals_ = {source.name: global_multiplier(checkpoint, source) for source in flat}
    check_block_scales(checkpoint, flat, readers)
    layers: dict[int, LayerExperts] = {}
    transfers: list[Transfer] = []
    shapes = {block.layer: block.projections for block in found.layout.experts}
    for layer, projections in local.items():
        blocks = {}
        for name, sources in projections.items():
            values = [globals_[source.name] for source in sources]
            blocks[name] = _allocate(shapes[layer][name], values, device)
            transfers += _transfers(blocks[name], sources)
        layers[layer] = _layer(blocks)
    with Progress("experts", sum(t.source.nbytes for t in transfers), enabled=progress) as bar:
        stream(checkpoint.files, transfers, readers=readers, progress=bar)
    return {index: layer.in_fragments() for index, layer in layers.items()} if fragments else layers


def num_experts(layout: Layout) -> int:
    return max((block.count for block in layout.experts), default=0)


def expert_bytes(block: ExpertBlock) -> int:
    """Bytes of one NVFP4 expert of a block, with its global scales."""
    return sum(n * k // 2 + n * k // BLOCK + 4 for n, k in block.projections.values())


def describe(name: str, tensor: torch.Tensor) -> TensorInfo:
    """A tensor in memory in the terms of a file, so that the same accounting serves both."""
    dtypes = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
    return TensorInfo(name, 0, dtypes.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, tensor.nbytes)


def require_nvfp4(sources: list[WeightSource]) -> None:
    if others := [source for source in sources if source.format != "nvfp4"]:
        raise CheckpointError(
            f"{others[0].name}: {others[0].algorithm} ({len(others):,} expert weights are not NVFP4); routed "
            "experts must be NVFP4. Use an NVFP4 export of the model."
        )


def _check_in_memory(sources: list[WeightSource], tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The global multiplier of every source. Raises for broken scales, after one synchronisation in all."""
    if not sources:
        return {}
    stored, largest = [], []
    for source in sources:
        assert source.scale is not None and source.global_scale is not None
        stored.append(tensors[source.global_scale.name].reshape(()))
        largest.append(tensors[source.scale.name].view(torch.uint8).max())
    # Only where the largest byte is one of NaN or negative values is a closer look needed: -0 is harmless.
    suspects = [s for s, byte in zip(sources, torch.stack(largest).tolist(), strict=True) if byte >= E4M3_NAN]
    if broken := [s for s in suspects if _has_bad_scales(s, tensors)]:
        raise CheckpointError(
            f"{broken[0].name}: NaN or negative block scales, in {len(broken):,} of {len(sources):,} expert "
            "weights; expected none. The export is broken: quantise again."
        )
    multipliers = {}
    for source, value in zip(sources, torch.stack(stored).tolist(), strict=True):
        multiplier = as_multiplier(value, source.global_is_divisor)
        if multiplier is None:
            raise CheckpointError(
                f"{source.name}: global scale {value}; expected a positive one. The export is broken: quantise again."
            )
        multipliers[source.name] = multiplier
    return multipliers


def _has_bad_scales(source: WeightSource, tensors: Mapping[str, torch.Tensor]) -> bool:
    assert source.scale is not None
    stats = block_scale_stats(tensors[source.scale.name].view(torch.uint8).cpu().numpy())
    return stats.nan + stats.negative > 0


def _move(block: NVFP4Tensor, sources: list[WeightSource], tensors: MutableMapping[str, torch.Tensor]) -> None:
    """Takes the originals out of `tensors` one by one, each freed when its slot holds it."""
    freed = 0
    for transfer in _transfers(block, sources):
        transfer.target.copy_(tensors.pop(transfer.source.name).view(torch.uint8))
        freed += transfer.source.nbytes
        if freed > TRIM_BYTES and block.codes.device.type == "cpu":
            freed = 0
            with suppress(OSError, AttributeError):  # not glibc, which else keeps what was freed for itself
                ctypes.CDLL("libc.so.6").malloc_trim(0)


def _allocate(shape: tuple[int, int], multipliers: list[float], device: torch.device | str) -> NVFP4Tensor:
    count, (n, k) = len(multipliers), shape
    return NVFP4Tensor(
        torch.empty(count, n, k // 2, dtype=torch.uint8, device=device),
        torch.empty(count, n, k // BLOCK, dtype=torch.uint8, device=device),
        torch.tensor(multipliers, dtype=torch.float32, device=device),
    )


def _transfers(block: NVFP4Tensor, sources: list[WeightSource]) -> Iterator[Transfer]:
    for slot, source in enumerate(sources):
        assert source.scale is not None
        yield Transfer(source.weight, block.codes[slot])
        yield Transfer(source.scale, block.block_scales[slot])


def _layer(blocks: Mapping[str, NVFP4Tensor]) -> LayerExperts:
    return LayerExperts(blocks.get("gate_proj"), blocks["up_proj"], blocks["down_proj"])
