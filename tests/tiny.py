"""Files for tests: safetensors written byte by byte, and checkpoints whose tensors are holes of a sparse file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.layouts.base import TensorSpec
from moe_nvfp4.published import published
from moe_nvfp4.safetensors_file import BITS, TensorInfo

INDEX = "model.safetensors.index.json"
MODELOPT_QWEN3 = "nvidia/Qwen3-30B-A3B-NVFP4"
CT_QWEN3 = "RedHatAI/Qwen3-30B-A3B-NVFP4"
QWEN3_6 = "nvidia/Qwen3.6-35B-A3B-NVFP4"
GEMMA4 = "nvidia/Gemma-4-26B-A4B-NVFP4"
CT_GEMMA4 = "RedHatAI/gemma-4-26B-A4B-it-NVFP4"
NEMOTRON = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4"

Specs = dict[str, TensorSpec]


def spec_bytes(spec: TensorSpec) -> int:
    return BITS[spec.dtype] * math.prod(spec.shape) // 8


def entries(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """A header whose tensors follow each other."""
    header, end = {}, 0
    for name, spec in specs.items():
        begin, end = end, end + spec_bytes(spec)
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    return header


def write_raw(path: Path, header: Any, data: bytes | int = b"", length: int | None = None) -> Path:
    """Any bytes as a header (or JSON for any object), with any length field; `data` may be a hole of a size."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write((len(raw) if length is None else length).to_bytes(8, "little") + raw)
        if isinstance(data, bytes):
            file.write(data)
        else:
            file.truncate(8 + len(raw) + data)
    return path


def write_sparse(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    hf_quant_config: Mapping[str, Any] | None = None,
    tensors_per_shard: int = 20_000,
) -> None:
    """A checkpoint in shards with an index. Its headers are real, its weights are holes."""
    folder.mkdir(exist_ok=True)
    names, weight_map = list(specs), {}
    for number, begin in enumerate(range(0, len(names), tensors_per_shard)):
        part = {name: specs[name] for name in names[begin : begin + tensors_per_shard]}
        shard = f"model-{number}.safetensors"
        weight_map |= dict.fromkeys(part, shard)
        write_raw(folder / shard, entries(part), sum(map(spec_bytes, part.values())))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    if hf_quant_config is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant_config))


def tiny_specs(name: str) -> tuple[Specs, dict[str, Any]]:
    """What a small checkpoint of a published kind holds, free to change, and its config."""
    source = published(name).scaled(tiny=True)
    return source.manifest(), dict(source.config)


def infos(specs: Mapping[str, TensorSpec]) -> dict[str, TensorInfo]:
    """The same as the reader would describe it, without a file."""
    found, end = {}, 0
    for name, spec in specs.items():
        found[name] = TensorInfo(name, 0, spec.dtype, spec.shape, end, spec_bytes(spec))
        end += spec_bytes(spec)
    return found


def overwrite(folder: Path, name: str, data: bytes, at: int = 0) -> None:
    """Changes bytes of one tensor of a checkpoint on disk."""
    with Checkpoint.open(folder) as checkpoint:
        info = checkpoint.tensors[name]
        path = checkpoint.files[info.file].path
    assert at + len(data) <= info.nbytes
    with open(path, "r+b") as file:
        file.seek(info.start + at)
        file.write(data)


def renamed(specs: Mapping[str, TensorSpec], pairs: Iterable[tuple[str, str]]) -> Specs:
    """Every name with the replacements made in it."""
    result = {}
    for name, spec in specs.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = spec
    return result
