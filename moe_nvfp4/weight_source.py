"""Which tensors make a weight, and in which format: decided from the tensors present, never from a config.

Two dialects become one canonical form. ModelOpt stores `weight`, `weight_scale` and `weight_scale_2`, a
multiplier; compressed-tensors stores `weight_packed`, `weight_scale` and `weight_global_scale`, a divisor.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.kernels.nvfp4 import BLOCK
from moe_nvfp4.safetensors_file import TensorInfo

Format = Literal["nvfp4", "fp8", "plain"]
Leaves = dict[str, TensorInfo]  # last part of a tensor's name -> tensor

# Prefixes of the published families, longest first; what they hold is named the same way below them.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "backbone.")
_EXPERTS = re.compile(r"\.(?:moe|mlp)\.experts\.(?=\d)")
# Parts that a text-only runner does without.
_IGNORED = (
    "mtp.", "visual.", "vision_tower.", "vision_model.", "vision_embedder.", "embed_vision.", "audio_tower.",
    "embed_audio.", "mm_projector.", "multi_modal_projector.",
)  # fmt: skip
# Of a weight-only path: activation scales are not used.
INPUT_SCALES = frozenset({"input_scale", "input_global_scale"})


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One weight of the model as the checkpoint holds it; `shape` is the logical [out, in]."""

    name: str  # as in the file, without the leaf
    format: Format
    shape: tuple[int, ...]
    weight: TensorInfo
    scale: TensorInfo | None = None  # of blocks (nvfp4), or per tensor or row (fp8)
    global_scale: TensorInfo | None = None
    global_is_divisor: bool = False

    @property
    def algorithm(self) -> str:
        if self.format == "fp8":
            assert self.scale is not None
            return "FP8 per tensor" if math.prod(self.scale.shape) == 1 else "FP8 per channel"
        return "NVFP4" if self.format == "nvfp4" else self.weight.dtype

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.weight, self.scale, self.global_scale) if info is not None)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)


def normalise(name: str) -> str:
    """A name without its family's prefix, so that all spellings of one module meet."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return _EXPERTS.sub(".experts.", name) if "experts." in name else name


def is_ignored(normalised: str) -> bool:
    """True for towers and multi-token prediction, which text generation does without."""
    return normalised.startswith(_IGNORED) or normalised.endswith(".rotary_emb.inv_freq")


def group_by_module(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Leaves], list[TensorInfo]]:
    """Normalised module name -> its tensors by last name part; and the tensors that are ignored."""
    modules: dict[str, Leaves] = {}
    ignored: list[TensorInfo] = []
    for name, info in tensors.items():
        normalised = normalise(name)
        if is_ignored(normalised):
            ignored.append(info)
            continue
        module, _, leaf = normalised.rpartition(".")
        leaves = modules.setdefault(module, {})
        if leaf in leaves:
            raise CheckpointError(f"{name} and {leaves[leaf].name} name the same tensor; a checkpoint holds it once")
        leaves[leaf] = info
    return modules, ignored


def weight_source(module: str, leaves: Leaves) -> WeightSource:
    """The weight of a module, whatever its dialect. Raises CheckpointError where the tensors do not fit."""
    packed = leaves.get("weight_packed")
    weight = packed or leaves.get("weight")
    if weight is None:
        raise CheckpointError(f"{module}: no weight among its tensors: {', '.join(sorted(leaves))}")
    name = weight.name.rpartition(".")[0]
    for leaf in leaves.keys() & _UNSUPPORTED_LEAVES.keys():
        raise CheckpointError(f"{name}: {leaf}: {_UNSUPPORTED_LEAVES[leaf]}. Use an export in plain NVFP4.")
    if packed is not None or (weight.dtype == "U8" and len(weight.shape) == 2):
        return _nvfp4(name, weight, leaves)
    scale = leaves.get("weight_scale")
    if weight.dtype == "F8_E4M3":
        return _fp8(name, weight, scale)
    if scale is not None or "weight_scale_2" in leaves:
        raise CheckpointError(
            f"{name}: {weight.dtype} weight with scales; expected U8 codes (NVFP4) or F8_E4M3 (FP8) beside "
            f"{', '.join(sorted(leaf for leaf in leaves if leaf.startswith('weight_')))}"
        )
    if weight.dtype not in ("BF16", "F16", "F32"):
        raise CheckpointError(f"{name}: {weight.dtype} weight without scales; expected BF16, F16 or F32")
    return WeightSource(name, "plain", weight.shape, weight)


_UNSUPPORTED_LEAVES = {
    "pre_quant_scale": "an AWQ input scale (NVFP4_AWQ), which is not supported",
    "weight_zero_point": "an asymmetric format, which is not supported",
    "svdquant_lora_a": "a low-rank branch (NVFP4_SVD), which is not supported",
    "svdquant_lora_b": "a low-rank branch (NVFP4_SVD), which is not supported",
    "weight_scale_inv": "FP8 in 128x128 blocks, which is not supported",
}


def _nvfp4(name: str, weight: TensorInfo, leaves: Leaves) -> WeightSource:
    divisor = weight.name.endswith("weight_packed")
    global_name = "weight_global_scale" if divisor else "weight_scale_2"
    scale, global_scale = leaves.get("weight_scale"), leaves.get(global_name)
    if scale is None or global_scale is None:
        absent = [leaf for leaf in ("weight_scale", global_name) if leaf not in leaves]
        raise CheckpointError(f"{name}: packed 4-bit weight without {' and '.join(absent)}: it cannot be decoded")
    if weight.dtype != "U8" or len(weight.shape) != 2:
        raise CheckpointError(f"{weight.name}: {weight.dtype} {list(weight.shape)}; expected U8 [out, in/2]")
    shape = (weight.shape[0], 2 * weight.shape[1])
    if scale.dtype != "F8_E4M3":
        raise CheckpointError(
            f"{scale.name}: dtype {scale.dtype}; NVFP4 block scales are F8_E4M3 (U8 scales are MXFP4, which is "
            "not supported)"
        )
    if shape[1] % BLOCK or scale.shape != (shape[0], shape[1] // BLOCK):
        raise CheckpointError(
            f"{scale.name}: shape {list(scale.shape)}; a weight of {list(shape)} in blocks of {BLOCK} needs "
            f"{[shape[0], shape[1] / BLOCK]}"
        )
    if global_scale.dtype != "F32" or math.prod(global_scale.shape) != 1:
        raise CheckpointError(
            f"{global_scale.name}: {global_scale.dtype} {list(global_scale.shape)}; expected one F32 value"
        )
    return WeightSource(name, "nvfp4", shape, weight, scale, global_scale, divisor)


def _fp8(name: str, weight: TensorInfo, scale: TensorInfo | None) -> WeightSource:
    if scale is None:
        raise CheckpointError(f"{name}: FP8 weight without weight_scale: it cannot be decoded")
    if scale.dtype not in ("F32", "BF16"):
        raise CheckpointError(
            f"{scale.name}: dtype {scale.dtype}; FP8 scales are F32 or BF16 (U8 scales are MXFP8, which is not "
            "supported)"
        )
    rows = weight.shape[0] if weight.shape else 0
    if len(weight.shape) != 2 or scale.shape not in ((), (1,), (rows,), (rows, 1)):
        raise CheckpointError(
            f"{scale.name}: shape {list(scale.shape)} for a weight of {list(weight.shape)}; expected one scale, "
            "or one per output row (blocks of 128x128 are not supported)"
        )
    return WeightSource(name, "fp8", weight.shape, weight, scale)


def kv_scale(modules: Mapping[str, Leaves], attention: str, which: Literal["k", "v"]) -> TensorInfo | None:
    """The FP8 KV-cache scale of an attention module, in any of the spellings exporters use."""
    places = (
        (f"{attention}.{which}_proj", f"{which}_scale"),
        (f"{attention}.{which}_proj", "output_scale"),
        (f"{attention}.attn", f"{which}_scale"),
        (f"{attention}.qkv_proj", f"{which}_scale"),
        (attention, f"{which}_scale"),
        (attention, "kv_scale"),
    )
    for module, leaf in places:
        if info := modules.get(module, {}).get(leaf):
            return info
    return None


def names_of(infos: Iterable[TensorInfo], most: int = 5) -> str:
    """A few tensor names for a message, and how many more there are."""
    names = [info.name for info in infos]
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
