"""The scales of a checkpoint, read once and counted: what is unusable, dead, or merged by other engines."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from statistics import median

import numpy as np

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.doctor_report import BlockScales, GlobalScales, ScaleRatios
from moe_nvfp4.progress import Progress
from moe_nvfp4.scales import (
    BlockScaleStats,
    as_multiplier,
    block_scale_stats,
    read_values,
    stored_global,
    visit_block_scales,
)
from moe_nvfp4.survey import Survey
from moe_nvfp4.weight_source import WeightSource

_ATTENTION = {f"{letter}_proj": f"attention {letter}" for letter in "qkvo"}
MANY_SUBNORMALS = 1e-3  # of the block scales of one kind; a few are normal where blocks differ much in size

_KINDS = (
    *(f"routed experts {projection}" for projection in ("gate", "up", "down")),
    *("shared expert", "dense MLP", "latent projections"),
    *_ATTENTION.values(),
    *("linear attention", "mamba", "router", "embedding", "lm_head", "norms", "other"),
)


def kind_of(parameter: str) -> str:
    """What a dense parameter is, from its normalised name."""
    module, _, leaf = parameter.rpartition(".")
    last = module.rpartition(".")[2]
    if last in ("gate", "shared_expert_gate", "router") or ".router." in module:
        return "router"
    if ".shared_expert" in module:
        return "shared expert"
    if last in ("embed_tokens", "embeddings"):
        return "embedding"
    if "norm" in last:
        return "norms"
    if last in _ATTENTION:
        return _ATTENTION[last]
    if last.startswith(("in_proj", "out_proj")):
        return "linear attention" if ".linear_attn." in module else "mamba"
    if last in ("gate_proj", "up_proj", "down_proj"):
        return "dense MLP"
    if last.endswith("latent_proj"):
        return "latent projections"
    return "lm_head" if last == "lm_head" and leaf == "weight" else "other"


class ScaleExamination:
    """All scales of a checkpoint, read once; weights go by their names in the file."""

    def __init__(self, checkpoint: Checkpoint, found: Survey, readers: int, progress: bool | None):
        self.checkpoint, self.found = checkpoint, found
        self.groups = group_by_kind(found)
        nvfp4 = [source for source in found.sources() if source.format == "nvfp4"]
        self.nvfp4 = {source.name: source for source in nvfp4}
        self.stored = {source.name: stored_global(checkpoint, source) for source in nvfp4}
        self.multipliers = {
            source.name: as_multiplier(self.stored[source.name], source.global_is_divisor) for source in nvfp4
        }
        self.fp8 = {
            source.name: read_values(checkpoint, source.scale).numpy()
            for source in found.dense.values()
            if source.format == "fp8" and source.scale is not None
        }
        self.kv_scales = _kv_scales(checkpoint, found)
        self.flawed = self._flawed_blocks(readers, progress)

    def _flawed_blocks(self, readers: int, progress: bool | None) -> dict[str, BlockScaleStats]:
        """Counts for the weights whose block scales are not all positive normal numbers."""
        flawed: dict[str, BlockScaleStats] = {}
        total = sum(source.scale.nbytes for source in self.nvfp4.values() if source.scale)
        with Progress("block scales", total, enabled=progress) as bar:

            def visit(source: WeightSource, scales: np.ndarray) -> None:
                stats = block_scale_stats(scales)
                if any(stats[1:]):
                    flawed[source.name] = stats
                bar.advance(stats.total)

            visit_block_scales(self.checkpoint, self.nvfp4.values(), visit, readers)
        return flawed

    @cached_property
    def dead(self) -> dict[str, str]:
        """Weights that decode to zero -> why."""
        dead = {name: "global scale 0" for name, value in self.multipliers.items() if value == 0}
        zero = {name: "all block scales 0" for name, stats in self.flawed.items() if stats.zero == stats.total}
        return dead | zero

    @cached_property
    def uncalibrated(self) -> dict[str, str]:
        """compressed-tensors writes 1.0 in place of a global scale that came out NaN or infinite."""
        divisors = (source.name for source in self.nvfp4.values() if source.global_is_divisor)
        return {name: "global scale 1.0" for name in divisors if self.stored[name] == 1}

    @cached_property
    def dead_experts(self) -> tuple[str, ...]:
        return self._experts(self.dead)

    @cached_property
    def uncalibrated_experts(self) -> tuple[str, ...]:
        return self._experts(self.uncalibrated)

    def _experts(self, weights: Mapping[str, str]) -> tuple[str, ...]:
        """One line for each expert that has one of the weights."""
        experts: dict[str, list[str]] = {}
        for kind, sources in self.groups.items():
            if kind.startswith("routed experts") and weights:
                for source in sources:
                    if why := weights.get(source.name):
                        expert, _, projection = source.name.rpartition(".")
                        experts.setdefault(expert, []).append(f"{projection} {why}")
        return tuple(f"{expert}: {', '.join(reasons)}" for expert, reasons in experts.items())

    def block_rows(self) -> Iterator[BlockScales]:
        for kind, sources in self.groups.items():
            sizes = [s.scale.nbytes for s in sources if s.format == "nvfp4" and s.scale is not None]
            if not sizes:
                continue
            flawed = [(self.flawed[s.name], s.name) for s in sources if s.name in self.flawed]
            sums = [sum(column) for column in zip(*(stats for stats, _ in flawed), strict=True)] or [0] * 5
            _, nan, negative, zero, subnormal = sums
            worst = max(flawed, key=_badness)[1] if flawed else None
            yield BlockScales(kind, len(sizes), sum(sizes), zero, subnormal, negative, nan, len(flawed), worst)

    def global_rows(self) -> Iterator[GlobalScales]:
        for kind, sources in self.groups.items():
            names = [source.name for source in sources if source.format == "nvfp4"]
            if names:
                usable = [self.multipliers[name] for name in names]
                yield _global_row(kind, "NVFP4", np.array([self.stored[name] for name in names]), usable)
            values = [self.fp8[source.name] for source in sources if source.format == "fp8"]
            if values:
                flat = np.concatenate(values)
                yield _global_row(kind, "FP8", flat, [as_multiplier(float(value), False) for value in flat])

    def ratio_rows(self) -> Iterator[ScaleRatios]:
        for kind, members in _merged_elsewhere(self.found).items():
            groups, ratios = 0, []
            for parent, names in members.items():
                values = [value for name in names if (value := self.multipliers.get(name))]
                if len(values) > 1:
                    groups += 1
                    if (ratio := max(values) / min(values)) != 1:
                        ratios.append((ratio, parent))
            if groups:
                largest, where = max(ratios, default=(None, None))
                middle = median(ratio for ratio, _ in ratios) if ratios else None
                yield ScaleRatios(kind, groups, len(ratios), middle, largest, where)

    def reasons(self) -> Iterator[str]:
        """Defects for which the loader refuses the checkpoint."""
        for kind, sources in self.groups.items():
            broken = [s.name for s in sources if (f := self.flawed.get(s.name)) and (f.nan or f.negative)]
            if broken:
                nan, negative = (sum(self.flawed[name][field] for name in broken) for field in (1, 2))
                yield f"{kind}: {nan:,} NaN and {negative:,} negative block scales in {some(broken)}"
            unusable = [s for s in sources if s.format == "nvfp4" and self.multipliers[s.name] is None]
            if unusable:
                values = ", ".join(f"{self.stored[s.name]:g}" for s in unusable[:5])
                yield f"{kind}: global scales that cannot be used ({values}) of {some(s.name for s in unusable)}"
            fp8 = [s.name for s in sources if s.format == "fp8" and _unusable(self.fp8[s.name])]
            if fp8:
                yield f"{kind}: NaN, infinite or negative FP8 scales of {some(fp8)}"

    def remarks(self) -> Iterator[str]:
        """What loads, but should be known."""
        if self.dead_experts:
            yield f"dead experts, which give zero ({len(self.dead_experts):,}): {some(self.dead_experts)}"
        if self.uncalibrated_experts:
            shown = some(self.uncalibrated_experts)
            yield f"experts that saw no calibration data ({len(self.uncalibrated_experts):,}): {shown}"
        routed = tuple(line.partition(":")[0] for line in (*self.dead_experts, *self.uncalibrated_experts))
        dense = [name for name in self.dead | self.uncalibrated if name.rpartition(".")[0] not in routed]
        if dense:
            yield f"dense weights that are zero or were not calibrated: {some(dense)}"
        for row in self.block_rows():
            alive = [s.name for s in self.groups[row.kind] if s.name in self.flawed and s.name not in self.dead]
            zero = sum(self.flawed[name].zero for name in alive)
            if zero:
                yield f"{row.kind}: {zero:,} of {row.scales:,} block scales are zero and erase their weights"
            if row.subnormal > MANY_SUBNORMALS * row.scales:
                yield f"{row.kind}: {row.subnormal:,} of {row.scales:,} block scales are subnormal and imprecise"
        if bad := [name for name, values in self.kv_scales.items() if _unusable(values) or not values.all()]:
            yield f"KV-cache scales that are zero, negative, NaN or infinite: {some(bad)}"


def some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most:,} more" if len(listed) > most else "")


def _badness(item: tuple[BlockScaleStats, str]) -> tuple[int, int, int]:
    stats, _ = item
    return stats.nan + stats.negative, stats.zero, stats.subnormal


def _kv_scales(checkpoint: Checkpoint, found: Survey) -> dict[str, np.ndarray]:
    infos = {info.name: info for pair in found.kv_scales.values() for info in pair if info is not None}
    return {
        name: read_values(checkpoint, info).numpy()
        for name, info in infos.items()
        if info.dtype in ("F32", "BF16") and math.prod(info.shape) == 1
    }


def _unusable(values: np.ndarray) -> bool:
    return not bool(np.isfinite(values).all()) or bool((values < 0).any())


def group_by_kind(found: Survey) -> dict[str, list[WeightSource]]:
    """Weights by kind, in the order of `_KINDS`."""
    groups: dict[str, list[WeightSource]] = {kind: [] for kind in _KINDS}
    for projections in found.experts.values():
        for projection, sources in projections.items():
            groups[f"routed experts {projection.removesuffix('_proj')}"] += sources
    for name, source in found.dense.items():
        groups[kind_of(name)].append(source)
    return {kind: sources for kind, sources in groups.items() if sources}


def _merged_elsewhere(found: Survey) -> dict[str, dict[str, list[str]]]:
    """Weights that engines fuse under one global scale: kind -> parent module -> names."""
    kinds: dict[str, dict[str, list[str]]] = {"routed experts gate/up": {}, "dense gate/up": {}, "attention q/k/v": {}}
    halves = ("gate_proj", "up_proj")
    for projections in found.experts.values():
        for half in halves:
            for source in projections.get(half, ()):
                kinds["routed experts gate/up"].setdefault(source.name.rpartition(".")[0], []).append(source.name)
    for source in found.dense.values():
        parent, _, last = source.name.rpartition(".")
        if last in halves:
            kinds["dense gate/up"].setdefault(parent, []).append(source.name)
        elif last in ("q_proj", "k_proj", "v_proj"):
            kinds["attention q/k/v"].setdefault(parent, []).append(source.name)
    return kinds


def _global_row(kind: str, algorithm: str, stored: np.ndarray, multipliers: Sequence[float | None]) -> GlobalScales:
    usable = [value for value in multipliers if value is not None]
    nan, negative = int(np.isnan(stored).sum()), int((stored < 0).sum())
    infinite = len(multipliers) - len(usable) - nan - negative
    extremes = (min(usable), float(median(usable)), max(usable)) if usable else (None, None, None)
    return GlobalScales(kind, algorithm, len(multipliers), usable.count(0.0), negative, nan, infinite, *extremes)
