"""Write a checkpoint with the names, shapes and dtypes of a published one and random values.

Nothing here needs the network or the original weights. A full-size checkpoint is written about as fast as the
page cache takes it: tensors are windows of random pools (synthesize_values.py), gathered by pwritev without
a copy.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from moe_nvfp4.checkpoint import read_json
from moe_nvfp4.errors import RequestError
from moe_nvfp4.progress import Progress
from moe_nvfp4.published import ITEM_BYTES, Published, StoredTensor, published
from moe_nvfp4.synthesize_values import SyntheticValues

BATCH_BYTES = 32 << 20
BATCH_TENSORS = 512  # Linux takes 1,024 buffers in one pwritev; a window that wraps is two
SPECIAL_TOKENS = ("bos", "eos", "pad")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class _Slice(NamedTuple):
    tensor: StoredTensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    header: bytes  # length field included
    tensors: list[StoredTensor]  # in the order of the file
    data_bytes: int

    @property
    def total_bytes(self) -> int:
        return len(self.header) + self.data_bytes


def synthesize(
    name: str,
    out: Path,
    *,
    layers: int | None = None,
    tiny: bool = False,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    threads: int | None = None,
    progress: bool | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
) -> None:
    """Write a synthetic checkpoint of a published kind into the folder `out`, which must be empty or absent.

    `layers` keeps the first layers only; `tiny` makes everything small, with a vocabulary of `vocab_size`.
    The bytes depend on these and on `seed`, not on `threads`. With `tokenizer`, a folder, its files are copied and
    the config takes its special tokens. `progress` None shows a progress line on a terminal.
    """
    if not 0 <= seed < 2**64:
        raise RequestError(f"seed: got {seed}; expected 0 to 2**64 - 1.")
    for option, value in (("shard_bytes", shard_bytes), ("threads", threads)):
        if value is not None and value < 1:
            raise RequestError(f"{option}: got {value}; expected at least 1.")
    source = published(name).scaled(layers, tiny, vocab_size)
    copies = _tokenizer_files(tokenizer)
    texts = _json_files(source, _special_tokens(tokenizer) if tokenizer else {})
    tensors = list(source.stored())
    shards = _shards(tensors, shard_bytes)
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = _index(shards)
    _check_destination(out, sum(shard.total_bytes for shard in shards))

    values = SyntheticValues(seed, max(prod(tensor.spec.shape) for tensor in tensors))
    new_folders = _make_folder(out)
    try:
        _write_shards(out, shards, values, threads or min(os.cpu_count() or 1, 16), progress)
        # The config comes last: a folder without one is not taken for a checkpoint.
        for path in copies:
            shutil.copyfile(path, out / path.name)
        for file, text in reversed(texts.items()):
            (out / file).write_text(text, encoding="utf-8")
    except BaseException as error:
        _remove(out, [*(shard.name for shard in shards), *texts, *(p.name for p in copies)], new_folders)
        if isinstance(error, OSError):
            raise RequestError(f"{out}: {error.strerror or error}; the partial files were removed.") from error
        raise


def _json_files(source: Published, special_tokens: dict[str, int | None]) -> dict[str, str]:
    config = {**source.config, **special_tokens}
    files: dict[str, Any] = {"config.json": config, "generation_config.json": _generation_config(config)}
    if source.hf_quant_config is not None:
        files["hf_quant_config.json"] = source.hf_quant_config
    return {file: json.dumps(content, indent=2) + "\n" for file, content in files.items()}


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", {})
    tokens = {}
    for kind in SPECIAL_TOKENS:
        value = config.get(f"{kind}_token_id", text.get(f"{kind}_token_id"))
        if value is not None:
            tokens[f"{kind}_token_id"] = value
    return tokens | {"transformers_version": config["transformers_version"]}


def _special_tokens(folder: Path) -> dict[str, int | None]:
    """The ids of a tokenizer's special tokens, as config.json spells them."""
    settings = read_json(folder / "tokenizer_config.json")
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    return {f"{kind}_token_id": ids.get(settings.get(f"{kind}_token")) for kind in SPECIAL_TOKENS}


def _tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not (folder / "tokenizer.json").is_file():
        raise RequestError(f"tokenizer: {folder} has no tokenizer.json; name a folder that holds one.")
    return [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]


def _bytes(tensor: StoredTensor) -> int:
    return ITEM_BYTES[tensor.spec.dtype] * prod(tensor.spec.shape)


def _shards(tensors: list[StoredTensor], shard_bytes: int) -> list[_Shard]:
    """Consecutive tensors of the model share a file until it is full."""
    groups: list[list[StoredTensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = _bytes(tensor)
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    return [
        _shard(f"model-{index:05}-of-{len(groups):05}.safetensors", group)
        for index, group in enumerate(groups, start=1)
    ]


def _shard(name: str, tensors: list[StoredTensor]) -> _Shard:
    ordered = sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.spec.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + _bytes(tensor)
        header[tensor.name] = {
            "dtype": tensor.spec.dtype,
            "shape": tensor.spec.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _Shard(name, len(text).to_bytes(8, "little") + text, ordered, end)


def _index(shards: list[_Shard]) -> str:
    weights = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_bytes for shard in shards)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(content, indent=2) + "\n"


def _check_destination(out: Path, needed: int) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file; name a new folder for the checkpoint.")
    if out.is_dir() and any(out.iterdir()):
        raise RequestError(f"{out} is not empty; name a new folder, or remove this one first.")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed + (16 << 20):  # config, index and tokenizer are far below 16 MiB more
        raise RequestError(
            f"{out}: needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; "
            "use another disk, or fewer layers (layers=N) or a tiny checkpoint (tiny=True)."
        )


def _make_folder(out: Path) -> list[Path]:
    """Create `out`; returns the folders that did not exist before, innermost first."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{out}: cannot create the folder: {error.strerror}.") from error
    return missing


def _remove(out: Path, files: Iterable[str], folders: list[Path]) -> None:
    for file in files:
        (out / file).unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # something else was put there meanwhile
            folder.rmdir()


def _write_shards(
    out: Path, shards: list[_Shard], values: SyntheticValues, threads: int, progress: bool | None
) -> None:
    total = sum(shard.data_bytes for shard in shards)
    with Progress("write", total, enabled=progress) as bar, ThreadPoolExecutor(threads) as executor:
        for shard in shards:
            file = os.open(out / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.ftruncate(file, shard.total_bytes)
                _write_all(file, 0, [shard.header])
                writes = [executor.submit(_write, file, *batch, values) for batch in _batches(shard)]
                try:
                    for write in as_completed(writes):
                        bar.advance(write.result())
                finally:  # after an error no thread may still hold the file
                    for write in writes:
                        write.cancel()
                    wait(writes)
            finally:
                os.close(file)


def _batches(shard: _Shard) -> Iterator[tuple[int, list[_Slice]]]:
    """(file position, slices that follow each other there), each for one thread."""
    position, size = len(shard.header), 0
    batch: list[_Slice] = []
    for tensor in shard.tensors:
        total = _bytes(tensor)
        for start in range(0, total, BATCH_BYTES):
            part = _Slice(tensor, start, min(start + BATCH_BYTES, total))
            if batch and (size + part.stop - start > BATCH_BYTES or len(batch) == BATCH_TENSORS):
                yield position, batch
                position, size, batch = position + size, 0, []
            batch.append(part)
            size += part.stop - start
    yield position, batch


def _write(file: int, position: int, batch: list[_Slice], values: SyntheticValues) -> int:
    buffers = [buffer for part in batch for buffer in values.buffers(*part)]
    return _write_all(file, position, buffers)


def _write_all(file: int, position: int, buffers: Sequence[memoryview | bytes]) -> int:
    total = 0
    pending = [memoryview(buffer) for buffer in buffers]
    while pending:
        written = os.pwritev(file, pending[:BATCH_TENSORS], position + total)
        total += written
        whole = 0
        while whole < len(pending) and written >= len(pending[whole]):
            written -= len(pending[whole])
            whole += 1
        pending = pending[whole:]
        if written:
            pending[0] = pending[0][written:]
    return total
