"""`Checkpoint`: a folder of safetensors, opened without reading any weight.

It knows files, tensors and configs; it knows neither ranks nor modules.
"""

import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.safetensors_file import SafetensorsFile, TensorInfo, open_regular

INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 200_000_000
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]


class Checkpoint:
    """An open checkpoint. Use `Checkpoint.open`; close it, or use it as a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.unindexed: list[str] = []  # in a shard, but not in the index
        self.config = read_json(folder / "config.json")
        try:
            with _without_garbage_collection():
                self._open_files()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path_or_hub_id: str | Path) -> "Checkpoint":
        """Opens a local folder, or a hub id such as `nvidia/Qwen3-30B-A3B-NVFP4` through the hub's cache."""
        return cls(resolve(path_or_hub_id))

    def _open_files(self) -> None:
        weight_map = self._weight_map()
        names = sorted(set(weight_map.values())) if weight_map else [self._single_file()]
        for index, name in enumerate(names):
            self.files.append(SafetensorsFile(self.folder / name, index))
        if weight_map is None:
            self.tensors = self.files[0].tensors
            return
        positions = {name: index for index, name in enumerate(names)}
        for name, shard in weight_map.items():
            info = self.files[positions[shard]].tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{INDEX}: places {name!r:.200} in {shard}, which does not hold it. Index and shards come "
                    "from different exports: download both again."
                )
            self.tensors[name] = info
        if sum(len(file.tensors) for file in self.files) != len(self.tensors):
            self.unindexed = [name for file in self.files for name in file.tensors if name not in weight_map]

    def _weight_map(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.exists():
            return None
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX}: weight_map: expected an object of tensor name to file name")
        for shard in {_shard_name(value) for value in weight_map.values()}:
            _check_shard(self.folder, shard)
        return weight_map

    def _single_file(self) -> str:
        if (self.folder / "model.safetensors").exists():
            return "model.safetensors"
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{self.folder}: {len(found)} safetensors files and no {INDEX}; expected one file, or shards "
                "with the index. Only safetensors checkpoints are read."
            )
        return found[0]

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """The quantisation settings: hf_quant_config.json's block where there is one, else config.json's."""
        path = self.folder / "hf_quant_config.json"
        if path.exists():
            block = read_json(path).get("quantization")
            if not isinstance(block, dict):
                raise CheckpointError("hf_quant_config.json: quantization: expected an object")
            return block
        for holder in (self.config, self.config.get("text_config")):
            if isinstance(holder, dict) and isinstance(holder.get("quantization_config"), dict):
                return dict(holder["quantization_config"])
        return {}

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor over the mapped file, read lazily and not copied."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        return self.files[info.file].tensor(info)

    def read(self, info: TensorInfo) -> bytearray:
        """The bytes of one tensor, without mapping the file."""
        data = bytearray(info.nbytes)
        self.files[info.file].read_into(info.start, [memoryview(data)])
        return data

    def where(self, info: TensorInfo) -> str:
        return f"{self.files[info.file].path.name}: {info.name}"

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The collector would visit some 100,000 new tuples over and over, which doubles the time to open."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file."""
    if not path.exists():
        raise CheckpointError(
            f"{path.parent}: no {path.name}; a checkpoint folder holds config.json and safetensors files"
        )
    with open(open_regular(path), "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected a JSON file of at most {MAX_JSON_BYTES:,} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}; expected an object")
    return value


def _shard_name(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{INDEX}: weight_map: {value!r:.80}; expected a file name")
    return value


def _check_shard(folder: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise CheckpointError(f"{INDEX}: names {name!r:.200}; a shard must lie inside the checkpoint's folder")
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX}: names {name!r:.200}; only .safetensors files are read")
    try:
        present = (folder / name).exists()
    except OSError:  # a name longer than the file system allows
        present = False
    if not present:
        raise CheckpointError(f"{INDEX}: names {name!r:.200}, which is not in {folder}. Download the missing shard.")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a path or a hub id."""
    try:
        folder = Path(path_or_hub_id).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~user of nobody
        raise CheckpointError(f"{str(path_or_hub_id)!r:.200}: not a usable path: {error}") from error
    if exists:
        raise CheckpointError(f"{folder}: a file; expected the checkpoint's folder")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_hub_id)):
        raise CheckpointError(f"{folder}: no such folder, and not a hub id of the form organisation/name")
    return _from_hub(str(path_or_hub_id))


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the hub's client failed: {reason}. "
            "Check the name and the network, log in for gated models, or pass the folder of a download."
        ) from error
