"""The published NVFP4 checkpoints: their configs and every tensor they hold, full-size or scaled down."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any, Literal, NamedTuple, get_args

from moe_nvfp4.errors import RequestError
from moe_nvfp4.layouts import layout
from moe_nvfp4.layouts.base import Config, ExpertBlock, Layout, Parameter, TensorSpec, Values
from moe_nvfp4.published_recipes import (
    RECIPES,
    Algorithm,
    Recipe,
    algorithms,
    hf_quant_config,
    quantization_config,
)
from moe_nvfp4.published_tiny import scaled_config

ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}

# What the bytes of a stored tensor mean: those of a plain parameter, or a part of a quantised one.
Quantized = Literal[
    "codes",  # two E2M1 codes per byte
    "block_scale",
    "global_scale",  # multiplies
    "global_divisor",  # divides
    "nvfp4_input_scale",
    "nvfp4_input_divisor",
    "fp8",
    "fp8_scale",
    "fp8_input_scale",
    "kv_scale",
]
Meaning = Values | Quantized
QUANTIZED: tuple[str, ...] = get_args(Quantized)


class StoredTensor(NamedTuple):
    name: str
    spec: TensorSpec
    meaning: Meaning
    fan_in: int  # last dimension of the plain parameter that this is, or is a part of


class _Nvfp4Names(NamedTuple):
    """How a dialect calls the parts of an NVFP4 module."""

    codes: str
    scalar: TensorSpec
    scalars: Mapping[str, Meaning]


_SCALAR = TensorSpec("F32", ())
_MODELOPT = _Nvfp4Names("weight", _SCALAR, {"weight_scale_2": "global_scale", "input_scale": "nvfp4_input_scale"})
_COMPRESSED_TENSORS = _Nvfp4Names(
    "weight_packed",
    TensorSpec("F32", (1,)),
    {"weight_global_scale": "global_divisor", "input_global_scale": "nvfp4_input_divisor"},
)


@cache
def _spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(dtype, shape)


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint as its repository holds it."""

    name: str
    config: Config  # config.json
    hf_quant_config: Config | None  # hf_quant_config.json
    layout: Layout
    recipe: Recipe = field(repr=False)

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor, in the order of the model."""
        algorithm = algorithms(self.recipe, self.layout)
        blocks = {block.prefix.partition(".experts.")[0]: block for block in self.layout.experts}
        for name, parameter in self._parameters():
            module = name.removesuffix(".weight")
            yield from self._module(module, name, parameter, algorithm(module) if parameter.linear else "")
            # The experts follow their router, so that a shard holds whole layers.
            router = module.removesuffix(".gate").removesuffix(".router.proj")
            if router != module and (block := blocks.pop(router, None)):
                yield from self._experts(block, algorithm)
        assert not blocks, f"experts without a router: {list(blocks)}"

    def manifest(self) -> dict[str, TensorSpec]:
        """Every tensor of the checkpoint with its dtype and shape."""
        return {tensor.name: tensor.spec for tensor in self.stored()}

    def total_bytes(self) -> int:
        return sum(ITEM_BYTES[spec.dtype] * prod(spec.shape) for _, spec, _, _ in self.stored())

    def scaled(self, layers: int | None = None, tiny: bool = False, vocab_size: int | None = None) -> "Published":
        """The same checkpoint with its first `layers` layers, or with small sizes throughout."""
        base = {name: value for name, value in self.config.items() if name != "quantization_config"}
        return _build(self.name, self.recipe, scaled_config(base, layers, tiny, vocab_size))

    def _parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.layout.parameters.items()
        yield from self.layout.ignored.items()
        if self.recipe.mtp:
            yield from self.layout.mtp.items()

    def _experts(self, block: ExpertBlock, algorithm: Callable[[str], Algorithm]) -> Iterator[StoredTensor]:
        parameters = {name: Parameter(shape, linear=True) for name, shape in block.projections.items()}
        # No list of a published file tells the experts of a layer apart.
        kinds = {name: algorithm(f"{block.prefix}0.{name}") for name in block.projections}
        for _, projection, module in block.names():
            yield from self._module(module, f"{module}.weight", parameters[projection], kinds[projection])

    def _module(self, module: str, name: str, parameter: Parameter, algorithm: Algorithm) -> Iterator[StoredTensor]:
        if algorithm == "NVFP4":
            rows, columns = parameter.shape
            names = _MODELOPT if self.recipe.dialect == "modelopt" else _COMPRESSED_TENSORS
            yield StoredTensor(f"{module}.{names.codes}", _spec("U8", rows, columns // 2), "codes", columns)
            scales = _spec("F8_E4M3", rows, columns // 16)
            yield StoredTensor(f"{module}.weight_scale", scales, "block_scale", columns)
            for suffix, meaning in names.scalars.items():
                yield StoredTensor(f"{module}.{suffix}", names.scalar, meaning, columns)
        elif algorithm == "FP8":
            columns = parameter.shape[-1]
            yield StoredTensor(name, TensorSpec("F8_E4M3", parameter.shape), "fp8", columns)
            yield StoredTensor(f"{module}.weight_scale", _SCALAR, "fp8_scale", columns)
            yield StoredTensor(f"{module}.input_scale", _SCALAR, "fp8_input_scale", columns)
        else:
            spec = TensorSpec(parameter.dtype, parameter.shape)
            yield StoredTensor(name, spec, parameter.values, parameter.shape[-1])
        if self.recipe.kv_scales and module.endswith((".k_proj", ".v_proj")):
            letter = module[-6]
            yield StoredTensor(f"{module}.{letter}_scale", _SCALAR, "kv_scale", parameter.shape[-1])


def published_names() -> tuple[str, ...]:
    return tuple(RECIPES)


def published(name: str) -> Published:
    """A known checkpoint, by its repository name."""
    if name not in RECIPES:
        raise RequestError(
            f"model {name!r} is not among the known published checkpoints. Use one of: {', '.join(RECIPES)}."
        )
    recipe = RECIPES[name]
    path = files("moe_nvfp4") / "published_configs" / f"{recipe.base}.json"
    return _build(name, recipe, json.loads(path.read_text(encoding="utf-8")))


def _build(name: str, recipe: Recipe, base: dict[str, Any]) -> Published:
    shape = layout(base)
    section = quantization_config(recipe, shape)
    config = base | ({"quantization_config": section} if section else {})
    return Published(name, config, hf_quant_config(recipe, shape), shape, recipe)
