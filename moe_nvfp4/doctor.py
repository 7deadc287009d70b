"""Examines a checkpoint from its headers and scales alone: no codes and no dense weights are read.

Problems are collected, not raised: only a folder that cannot be opened, or whose config.json describes no
known architecture, is an error.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_nvfp4.checkpoint import Checkpoint, read_json
from moe_nvfp4.dense_weights import dense_bytes
from moe_nvfp4.doctor_report import (
    COMMON_GPUS_GB,
    USABLE,
    Conventions,
    Declared,
    Experts,
    Memory,
    MemoryRow,
    Part,
    Report,
    render,
)
from moe_nvfp4.doctor_scales import ScaleExamination, some
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.expert_buffers import expert_bytes, num_experts
from moe_nvfp4.layouts import CacheGeometry, layout
from moe_nvfp4.models import model_config
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.safetensors_file import TensorInfo
from moe_nvfp4.streaming import DEFAULT_READERS
from moe_nvfp4.survey import Survey, check_quantization, survey
from moe_nvfp4.weight_source import normalise

__all__ = ["Report", "examine", "render"]

GPU_COUNTS = (1, 2, 4, 8)
SEQUENCES, TOKENS = 8, 4096


def examine(path_or_hub_id: str | Path, *, readers: int = DEFAULT_READERS, progress: bool | None = None) -> Report:
    """Reads headers and scales. Raises CheckpointError for what cannot be opened or is of no known kind."""
    with Checkpoint.open(path_or_hub_id) as checkpoint:
        found = survey(checkpoint.tensors, layout(checkpoint.config))
        scales = ScaleExamination(checkpoint, found, readers, progress)
        declared = _declared(checkpoint)
        runs, runs_note = _runs(checkpoint.config)
        without_input = _without_input_scale(checkpoint, scales)
        return Report(
            path=str(checkpoint.folder),
            architecture=_architecture(checkpoint.config),
            model_type=found.layout.model_type,
            tensors=len(checkpoint.tensors),
            nbytes=checkpoint.nbytes,
            declared=declared,
            parts=_parts(scales),
            ignored=_ignored(found.ignored),
            experts=_experts(checkpoint.config, found),
            conventions=_conventions(found, scales, len(scales.nvfp4) - len(without_input)),
            ratios=tuple(scales.ratio_rows()),
            global_scales=tuple(scales.global_rows()),
            block_scales=tuple(scales.block_rows()),
            dead_experts=scales.dead_experts,
            uncalibrated_experts=scales.uncalibrated_experts,
            missing=found.missing,
            unexpected=tuple(info.name for info in found.unexpected),
            unindexed=tuple(checkpoint.unindexed),
            memory=_memory(found),
            runs=runs,
            runs_note=runs_note,
            reasons=(*_reasons(checkpoint, found), *scales.reasons()),
            remarks=(*_remarks(checkpoint, scales, declared, without_input), *scales.remarks()),
        )


def _reasons(checkpoint: Checkpoint, found: Survey) -> Iterator[str]:
    """Why the loader would refuse the checkpoint, its scales aside."""
    try:
        check_quantization(checkpoint.quantization)
    except CheckpointError as error:
        yield str(error)
    yield from found.problems
    if lost := sorted(set(found.missing) & {normalise(name) for name in checkpoint.unindexed}):
        yield f"the index leaves out {some(lost)}, which the shards hold: download the index again"
    experts = (s for projections in found.experts.values() for sources in projections.values() for s in sources)
    if others := [source for source in experts if source.format != "nvfp4"]:
        formats = ", ".join(sorted({source.algorithm for source in others}))
        names = some(source.name for source in others)
        yield f"routed experts that are not NVFP4 but {formats}: {names}. Use an NVFP4 export of the model."


def _remarks(
    checkpoint: Checkpoint, scales: ScaleExamination, declared: Iterable[Declared], without_input: list[str]
) -> Iterator[str]:
    for what in ("algorithm", "kv_cache"):
        stated = {item.file: str(getattr(item, what)) for item in declared if getattr(item, what) is not None}
        if len({value.casefold() for value in stated.values()}) > 1:
            views = "; ".join(f"{file}: {value}" for file, value in stated.items())
            yield f"the config files disagree on {what.replace('_', ' ')}: {views}. The tensors decide here."
    if checkpoint.unindexed:
        names = some(checkpoint.unindexed)
        yield f"tensors of the shards that the index leaves out, not read ({len(checkpoint.unindexed):,}): {names}"
    routed = {source.name for kind, part in scales.groups.items() if kind.startswith("routed") for source in part}
    if 0 < len(absent := [name for name in without_input if name in routed]) < len(routed):
        yield (
            f"{len(absent):,} of {len(routed):,} routed expert weights have no input scale: {some(absent)}. It is not "
            "needed here; engines that quantise activations divide by zero."
        )


def _declared(checkpoint: Checkpoint) -> tuple[Declared, ...]:
    """What the config files say of quantisation."""
    found = []
    path = checkpoint.folder / "hf_quant_config.json"
    if path.exists():
        content = read_json(path)
        if isinstance(block := content.get("quantization"), Mapping):
            found.append(_settings(path.name, {"producer": content.get("producer"), **block}))
    for holder in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(holder, Mapping) and isinstance(block := holder.get("quantization_config"), Mapping):
            found.append(_settings("config.json", block))
            break
    return tuple(found)


def _settings(file: str, block: Mapping[str, Any]) -> Declared:
    algorithm = next((block[key] for key in ("quant_algo", "format", "quant_method") if block.get(key)), None)
    kv_cache: str | None = None
    for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if key in block:
            kv_cache = _kv_cache(block[key])
            break
    producer = block.get("producer")
    if isinstance(producer, Mapping):
        producer = f"{producer.get('name', '')} {producer.get('version', '')}".strip()
    elif block.get("quant_method") == "compressed-tensors":
        producer = f"compressed-tensors {block.get('version', '')}".strip()
    return Declared(file, _short(algorithm), kv_cache, _short(producer))


def _kv_cache(scheme: object) -> str | None:
    if isinstance(scheme, Mapping):
        kind = "FP" if scheme.get("type") == "float" else str(scheme.get("type")).upper()
        return _short(f"{kind}{scheme.get('num_bits', '')}")
    return _short(scheme) or "none"


def _short(value: object) -> str | None:
    return str(value)[:60] if value else None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return (_short(names[0]) if isinstance(names, list) and names else None) or "architecture not stated"


def _runs(config: Mapping[str, Any]) -> tuple[bool, str]:
    try:
        model_config(config)
    except CheckpointError as error:
        return False, f"Inspected only. {error}"
    return True, "This version runs the architecture."


def _parts(scales: ScaleExamination) -> tuple[Part, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for kind, sources in scales.groups.items():
        for source in sources:
            key = kind, source.algorithm
            counts[key] += 1
            nbytes[key] += source.nbytes
    return tuple(Part(*key, count, nbytes[key]) for key, count in counts.items())


def _ignored(infos: Iterable[TensorInfo]) -> tuple[Part, ...]:
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in infos:
        part = normalise(info.name).partition(".")[0]
        counts[part] += 1
        nbytes[part] += info.nbytes
    return tuple(Part(part, "not used", count, nbytes[part]) for part, count in counts.items())


def _experts(config: Mapping[str, Any], found: Survey) -> Experts:
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    top_k = next((text[key] for key in ("num_experts_per_tok", "top_k_experts") if text.get(key)), None)
    nbytes = sum(s.nbytes for projections in found.experts.values() for part in projections.values() for s in part)
    layers = len(found.layout.experts)
    return Experts(layers, num_experts(found.layout), top_k if layers and isinstance(top_k, int) else None, nbytes)


def _conventions(found: Survey, scales: ScaleExamination, input_scales: int) -> Conventions:
    divisors = sum(source.global_is_divisor for source in scales.nvfp4.values())
    multipliers = len(scales.nvfp4) - divisors
    dialect, direction = "no NVFP4 weights", "none"
    if multipliers and divisors:
        dialect = "ModelOpt and compressed-tensors names"
        direction = f"{multipliers:,} multipliers (ModelOpt) and {divisors:,} divisors (compressed-tensors)"
    elif multipliers:
        dialect, direction = "ModelOpt", "multipliers"
    elif divisors:
        dialect, direction = "compressed-tensors", "divisors"
    return Conventions(dialect, direction, len(scales.nvfp4), input_scales, len(scales.kv_scales))


def _without_input_scale(checkpoint: Checkpoint, scales: ScaleExamination) -> list[str]:
    leaves = [
        (source.name, "input_global_scale" if source.global_is_divisor else "input_scale")
        for source in scales.nvfp4.values()
    ]
    return [name for name, leaf in leaves if f"{name}.{leaf}" not in checkpoint.tensors]


def _memory(found: Survey) -> Memory:
    """Experts sharded evenly, everything else on every GPU."""
    blocks, count = found.layout.experts, num_experts(found.layout)
    dense = sum(dense_bytes(source, torch.bfloat16) for source in found.dense.values())
    geometry, itemsize = found.layout.cache, torch.bfloat16.itemsize
    cache = SEQUENCES * geometry.bytes(TOKENS, itemsize)
    rows = []
    for gpus in GPU_COUNTS:
        if gpus > max(count, 1):
            continue
        placement = Placement.even((block.layer for block in blocks), count, gpus)
        local = [
            sum(expert_bytes(block) * len(placement.local(block.layer, rank)) for block in blocks)
            for rank in range(gpus)
        ]
        total = max(local) + dense + cache
        fitting = (gb for gb in COMMON_GPUS_GB if total <= gb * 1e9 * USABLE)
        rows.append(MemoryRow(gpus, max(local), dense, cache, total, next(fitting, None)))
    growing = 1000 * geometry.kv_elements_per_token * itemsize
    return Memory(growing, _fixed_bytes(geometry, itemsize), SEQUENCES, TOKENS, tuple(rows))


def _fixed_bytes(geometry: CacheGeometry, itemsize: int) -> int:
    """What a sequence takes whatever its length, once it has filled the sliding windows."""
    return geometry.state_bytes + geometry.window * geometry.window_kv_elements_per_token * itemsize
