"""Strict accounting: every tensor of a checkpoint is used or knowingly ignored, every parameter is filled.

A survey reads names, dtypes and shapes only. It collects all problems, so that one message names them all.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.layouts import layout
from moe_nvfp4.layouts.base import ExpertBlock, Layout, Parameter
from moe_nvfp4.safetensors_file import TensorInfo
from moe_nvfp4.weight_source import (
    INPUT_SCALES,
    Leaves,
    WeightSource,
    group_by_module,
    kv_scale,
    names_of,
    normalise,
    weight_source,
)

SUPPORTED_ALGORITHMS = frozenset(
    {"NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", "NONE"}
)
SUPPORTED_CT_FORMATS = frozenset(
    {"nvfp4-pack-quantized", "float-quantized", "mixed-precision", "naive-quantized", "dense"}
)
ExpertSources = dict[str, list[WeightSource]]  # projection -> weight of each expert
KVScales = tuple[TensorInfo | None, TensorInfo | None]  # of K and of V


@dataclass(frozen=True)
class Survey:
    """What a checkpoint holds for a layout. Dense weights go by their normalised parameter name."""

    layout: Layout
    dense: Mapping[str, WeightSource]
    experts: Mapping[int, ExpertSources]  # by layer
    kv_scales: Mapping[str, KVScales]  # by attention module, where there are any
    input_scales: int
    ignored: tuple[TensorInfo, ...]
    missing: tuple[str, ...]
    unexpected: tuple[TensorInfo, ...]
    invalid: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        found = list(self.invalid)
        if self.missing:
            shown = ", ".join(self.missing[:5]) + (", ..." if len(self.missing) > 5 else "")
            found.append(f"{len(self.missing):,} weights missing that config.json asks for: {shown}")
        if self.unexpected:
            found.append(f"{len(self.unexpected):,} tensors that nothing uses: {names_of(self.unexpected)}")
        return found

    def require_complete(self, where: str) -> None:
        if not self.problems:
            return
        shown = "\n  ".join(self.problems[:8])
        more = f"\n  and {len(self.problems) - 8:,} more" if len(self.problems) > 8 else ""
        raise CheckpointError(
            f"{where}: config.json and the tensors disagree:\n  {shown}{more}\n"
            "Nothing was loaded. Download the checkpoint again, or correct config.json; "
            "`moe-nvfp4 inspect` lists everything."
        )

    def with_shared_experts(self, shared: Mapping[int, Mapping[str, str]]) -> "Survey":
        """Shared experts (projection -> dense weight, by layer) as the last of the routed ones, if that fits all."""
        blocks = {block.layer: block for block in self.layout.experts}
        names = {name for projections in shared.values() for name in projections.values()}
        fits = bool(blocks) and shared.keys() == blocks.keys() and names <= self.dense.keys()
        if not fits or not all(
            self.dense[name].format == "nvfp4"
            and tuple(self.dense[name].shape) == blocks[layer].projections[projection]
            for layer, projections in shared.items()
            for projection, name in projections.items()
        ):
            return self
        return replace(
            self,
            layout=replace(self.layout, experts=tuple(replace(b, count=b.count + 1) for b in self.layout.experts)),
            dense={name: source for name, source in self.dense.items() if name not in names},
            experts={
                layer: {
                    projection: [*self.experts[layer][projection], self.dense[name]] for projection, name in p.items()
                }
                for layer, p in shared.items()
            },
        )

    def sources(self) -> Iterator[WeightSource]:
        yield from self.dense.values()
        for projections in self.experts.values():
            for sources in projections.values():
                yield from sources


def survey_checkpoint(checkpoint: Checkpoint) -> Survey:
    """Checks the configs, then accounts for every tensor; missing and unexpected ones do not raise here."""
    check_quantization(checkpoint.quantization)
    return survey(checkpoint.tensors, layout(checkpoint.config))


def survey(tensors: Mapping[str, TensorInfo], expected: Layout) -> Survey:
    modules, ignored = group_by_module(tensors)
    account = _Account(modules)
    dense = {}
    for name, parameter in expected.parameters.items():
        if source := account.take(normalise(name), parameter):
            dense[normalise(name)] = source
    experts = {block.layer: account.take_experts(block) for block in expected.experts}
    kv_scales = account.take_kv_scales()
    if "lm_head.weight" not in dense and "lm_head" in modules:
        # A tied head that was exported all the same: the embedding is what config.json asks for.
        ignored.extend(modules.pop("lm_head").values())
    unexpected = [info for leaves in modules.values() for info in leaves.values()]
    return Survey(
        layout=expected,
        dense=dense,
        experts=experts,
        kv_scales=kv_scales,
        input_scales=account.input_scales,
        ignored=tuple(ignored),
        missing=tuple(account.missing),
        unexpected=tuple(unexpected),
        invalid=tuple(account.invalid),
    )


class _Account:
    """Takes tensors out of `modules` as they are accounted for; what stays there is unexpected."""

    def __init__(self, modules: dict[str, Leaves]):
        self.modules = modules
        self.attention: set[str] = set()  # modules that have a k_proj
        self.input_scales = 0
        self.missing: list[str] = []
        self.invalid: list[str] = []

    def take(self, name: str, parameter: Parameter) -> WeightSource | None:
        module, _, leaf = name.rpartition(".")
        leaves = self.modules.get(module)
        if leaves is None or not (leaf in leaves or (leaf == "weight" and "weight_packed" in leaves)):
            self.missing.append(name)
            return None
        source = None
        try:
            source = weight_source(module, leaves) if leaf == "weight" else _plain(leaves[leaf])
            _check(source, parameter)
        except CheckpointError as error:
            self.invalid.append(str(error))
            source = None
            for key in [key for key in leaves if key == leaf or (leaf == "weight" and key.startswith("weight"))]:
                del leaves[key]
        else:
            for info in source.tensors:
                del leaves[info.name.rpartition(".")[2]]
        if leaf == "weight":
            for key in INPUT_SCALES:
                if leaves.pop(key, None):
                    self.input_scales += 1
            if module.endswith(".k_proj"):
                self.attention.add(module.removesuffix(".k_proj"))
        return source

    def take_experts(self, block: ExpertBlock) -> ExpertSources:
        prefix, sources = normalise(block.prefix + "0.").removesuffix("0."), {}
        for projection, shape in block.projections.items():
            parameter = Parameter(shape, linear=True)
            taken = (self.take(f"{prefix}{i}.{projection}.weight", parameter) for i in range(block.count))
            sources[projection] = [source for source in taken if source]
        return sources

    def take_kv_scales(self) -> dict[str, KVScales]:
        """Of the attention modules that were taken; scales of other modules stay unexpected."""
        found = {}
        for attention in sorted(self.attention):
            scales = kv_scale(self.modules, attention, "k"), kv_scale(self.modules, attention, "v")
            if scales == (None, None):
                continue
            found[attention] = scales
            for info in {info for info in scales if info is not None}:
                if math.prod(info.shape) != 1 or info.dtype not in ("F32", "BF16"):
                    self.invalid.append(f"{info.name}: {info.dtype} {list(info.shape)}; expected one F32 or BF16")
                module, _, leaf = normalise(info.name).rpartition(".")
                del self.modules[module][leaf]
        return found


def _check(source: WeightSource, parameter: Parameter) -> None:
    if source.shape != parameter.shape:
        raise CheckpointError(
            f"{source.weight.name}: shape {list(source.shape)}; config.json implies {list(parameter.shape)}"
        )
    if source.format != "plain" and not parameter.linear:
        raise CheckpointError(f"{source.weight.name}: {source.algorithm}; this parameter cannot be quantised")


def _plain(info: TensorInfo) -> WeightSource:
    if info.dtype not in ("BF16", "F16", "F32"):
        raise CheckpointError(f"{info.name}: dtype {info.dtype}; expected BF16, F16 or F32")
    return WeightSource(info.name.rpartition(".")[0], "plain", info.shape, info)


def check_quantization(quantization: Mapping[str, Any]) -> None:
    """Refuses what cannot be decoded; which module has which format is left to the tensors."""
    method = str(quantization.get("quant_method", "modelopt")).lower()
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        groups = groups.values() if isinstance(groups, Mapping) else ()
        holders = [quantization, *(group for group in groups if isinstance(group, Mapping))]
        if unknown := {str(h["format"]) for h in holders if h.get("format")} - SUPPORTED_CT_FORMATS:
            _refuse("quantization_config: format", unknown, SUPPORTED_CT_FORMATS)
        return
    if method not in ("modelopt", "none"):
        _refuse("quantization_config: quant_method", {method}, {"modelopt", "compressed-tensors"})
    layers = quantization.get("quantized_layers") or {}
    entries = [quantization, *(layers.values() if isinstance(layers, Mapping) else ())]
    entries = [entry for entry in entries if isinstance(entry, Mapping)]
    algorithms = {str(entry["quant_algo"]).upper() for entry in entries if entry.get("quant_algo")}
    if unknown := algorithms - SUPPORTED_ALGORITHMS:
        _refuse("quant_algo", unknown, SUPPORTED_ALGORITHMS - {"NONE"})
    if sizes := {str(entry["group_size"]) for entry in entries if entry.get("group_size")} - {"16"}:
        _refuse("group_size", sizes, {"16"})


def _refuse(field: str, given: set[str], supported: Any) -> None:
    raise CheckpointError(
        f"{field} {', '.join(sorted(given)):.200}: not supported; supported are {', '.join(sorted(supported))}. "
        "Use another export of the model."
    )
