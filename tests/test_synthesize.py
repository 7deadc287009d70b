"""Synthetic checkpoints: what `safetensors` reads back, sane values, equal bytes, and refusals."""

import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moe_nvfp4 import synthesize as module
from moe_nvfp4.errors import RequestError
from moe_nvfp4.published import ITEM_BYTES, StoredTensor, published, published_names
from moe_nvfp4.synthesize import synthesize

QWEN3, QWEN3_5 = "nvidia/Qwen3-30B-A3B-NVFP4", "nvidia/Qwen3.6-35B-A3B-NVFP4"
GEMMA4_CT = "RedHatAI/gemma-4-26B-A4B-it-NVFP4"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


def tiny(name: str, out: Path, **options: Any) -> Path:
    synthesize(name, out, tiny=True, progress=False, **options)
    return out


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


@pytest.fixture(scope="module", params=published_names())
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tensors(checkpoint: tuple[str, Path]) -> dict[str, torch.Tensor]:
    return read(checkpoint[1])


def stored(name: str) -> list[StoredTensor]:
    return list(published(name).scaled(tiny=True).stored())


def test_tensors_are_those_of_the_manifest(checkpoint: tuple[str, Path], tensors: dict[str, torch.Tensor]) -> None:
    manifest = published(checkpoint[0]).scaled(tiny=True).manifest()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (DTYPES[dtype], shape) for name, (dtype, shape) in manifest.items()
    }


def test_json_files(checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    source = published(name).scaled(tiny=True)
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text()) == source.config
    if source.hf_quant_config is not None:
        files.add("hf_quant_config.json")
        assert json.loads((folder / "hf_quant_config.json").read_text()) == source.hf_quant_config
    assert {path.name for path in folder.iterdir()} == files
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] is not None


# (least, greatest) standard deviation and mean of a plain tensor, by what it is; big ones only.
PLAIN: dict[str, Callable[[torch.Tensor], bool]] = {
    "embedding": lambda x: abs(x.std() - 1) < 0.1,
    "norm": lambda x: abs(x.mean() - 1) < 0.1 and x.min() > 0.3,
    "offset_norm": lambda x: abs(x.mean()) < 0.1 and x.abs().max() < 0.7,
    "unscaled_norm": lambda x: abs(x.mean() * len(x) ** 0.25 - 1) < 0.2,
    "bias": lambda x: x.abs().max() < 0.7,
    "scalar": lambda x: x.min() > 0.3 and x.max() < 1.7,
    "decay": lambda x: x.min() >= 0 and x.max() < 2.8,
    "step": lambda x: torch.nn.functional.softplus(x).max() < 0.11,
}


def test_values_are_finite_and_sane(checkpoint: tuple[str, Path], tensors: dict[str, torch.Tensor]) -> None:
    for name, _, meaning, fan_in in stored(checkpoint[0]):
        x = tensors[name].float()
        assert x.isfinite().all(), name
        if meaning in PLAIN:
            assert PLAIN[meaning](x), (name, meaning, x)
        elif meaning == "linear" and x.numel() > 1000:
            assert 0.3 < x.std() * fan_in**0.5 < 3, name
        elif meaning == "block_scale":
            assert x.min() >= 0.5 and x.max() < 2, name
        elif meaning not in ("codes", "fp8", "linear"):
            assert x.numel() == 1 and x > 0, name


def test_dequantised_weights_have_the_right_size(
    checkpoint: tuple[str, Path], tensors: dict[str, torch.Tensor]
) -> None:
    spreads = []
    for name, spec, meaning, fan_in in stored(checkpoint[0]):
        prefix = name.rpartition(".")[0]
        if meaning == "codes":
            codes = torch.stack([tensors[name] & 15, tensors[name] >> 4], -1).flatten(1).long()
            scales = tensors[f"{prefix}.weight_scale"].float().repeat_interleave(16, 1)
            if f"{prefix}.weight_scale_2" in tensors:
                factor = tensors[f"{prefix}.weight_scale_2"]
            else:
                factor = 1 / tensors[f"{prefix}.weight_global_scale"]
            weight = E2M1[codes] * scales * factor
        elif meaning == "fp8":
            weight = tensors[name].float() * tensors[f"{prefix}.weight_scale"]
        else:
            continue
        spreads.append(weight.std().item() * fan_in**0.5)
        assert 0.4 < spreads[-1] < 2.4, (name, spec)
    # Each module has a scale of its own.
    assert max(spreads) > 2 * min(spreads)
    assert len(set(spreads)) == len(spreads)


def test_files_are_canonical(checkpoint: tuple[str, Path]) -> None:
    path = checkpoint[1] / "model.safetensors"
    header, data = header_of(path)
    assert header.pop("__metadata__") == {"format": "pt"}
    assert data % 8 == 0
    order = sorted(header, key=lambda name: (-ITEM_BYTES[header[name]["dtype"]], name))
    assert list(header) == order
    edges = [header[name]["data_offsets"] for name in order]
    assert edges[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    assert edges[-1][1] + data == path.stat().st_size


@pytest.mark.parametrize("name", [QWEN3_5, GEMMA4_CT])
def test_bytes_depend_on_the_seed_and_not_on_threads(name: str, tmp_path: Path) -> None:
    one = tiny(name, tmp_path / "one", threads=1, shard_bytes=100_000)
    same = tiny(name, tmp_path / "same", threads=7, shard_bytes=100_000)
    other = tiny(name, tmp_path / "other", seed=1, shard_bytes=100_000)
    assert digests(one) == digests(same)
    shards = [path.name for path in one.glob("*.safetensors")]
    assert all(digests(one)[shard] != digests(other)[shard] for shard in shards)
    assert digests(one)["config.json"] == digests(other)["config.json"]


def test_batches_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny(QWEN3_5, tmp_path / "whole")
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)
    monkeypatch.setattr(module, "BATCH_TENSORS", 3)
    assert digests(tiny(QWEN3_5, tmp_path / "pieces")) == digests(whole)


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny(QWEN3, tmp_path / "whole")
    pwritev = os.pwritev

    def short(file: int, buffers: list[memoryview], position: int) -> int:
        first = buffers[0]
        return pwritev(file, [first[: max(1, len(first) // 2)]], position)

    monkeypatch.setattr(os, "pwritev", short)
    assert digests(tiny(QWEN3, tmp_path / "short")) == digests(whole)


def test_shards_and_index(tmp_path: Path) -> None:
    out, whole = tiny(QWEN3, tmp_path / "out", shard_bytes=60_000), tiny(QWEN3, tmp_path / "whole")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == published(QWEN3).scaled(tiny=True).total_bytes()
    for shard in shards:
        header, data = header_of(out / shard)
        assert {n for n, file in index["weight_map"].items() if file == shard} == header.keys() - {"__metadata__"}
        # A tensor larger than a shard has one of its own.
        assert (out / shard).stat().st_size - data <= 60_000 or len(header) == 2
    expected = read(whole)
    assert all(
        torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
        for name, tensor in read(out).items()
        if tensor.ndim
    )


def test_layers_with_a_small_vocabulary(tmp_path: Path) -> None:
    tiny(QWEN3, tmp_path / "out", layers=3, vocab_size=96)
    found = read(tmp_path / "out")
    assert found["lm_head.weight"].shape == (96, 64)
    assert "model.layers.2.mlp.gate.weight" in found and "model.layers.3.mlp.gate.weight" not in found


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"added_tokens": [{"id": 7, "content": "<end>"}]}')
    (source / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "other.txt").write_text("x")
    out = tiny(QWEN3, tmp_path / "out", tokenizer=source)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").exists() and not (out / "other.txt").exists()
    for file in ("config.json", "generation_config.json"):
        config = json.loads((out / file).read_text())
        assert (config["eos_token_id"], config.get("bos_token_id")) == (7, None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "nobody/none"}, "not among the known"),
        ({"layers": 99}, "layers: got 99"),
        ({"seed": -1}, "seed: got -1"),
        ({"threads": 0}, "threads: got 0"),
        ({"shard_bytes": 0}, "shard_bytes: got 0"),
        ({"tokenizer": Path("/nowhere")}, r"no tokenizer\.json"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        synthesize(**{"name": QWEN3, "out": tmp_path / "out", "tiny": True, **options})
    assert not (tmp_path / "out").exists()


def test_used_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(RequestError, match="not empty"):
        tiny(QWEN3, tmp_path)
    with pytest.raises(RequestError, match="is a file"):
        tiny(QWEN3, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000_000))
    with pytest.raises(RequestError, match=r"needs 18\.10 GB, but .* has 1\.00 GB free; use"):
        synthesize(QWEN3, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "failure, raised",
    [(OSError(28, "No space left on device"), RequestError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
@pytest.mark.parametrize("existing", [False, True])
def test_partial_files_are_removed(
    failure: BaseException, raised: type, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    pwritev = os.pwritev

    def fail(*arguments: Any) -> int:
        if next(calls) == 4:
            raise failure
        return pwritev(*arguments)

    monkeypatch.setattr(os, "pwritev", fail)
    out = tmp_path / "a" / "out"
    if existing:
        out.mkdir(parents=True)
    with pytest.raises(raised):
        tiny(QWEN3, out, shard_bytes=60_000)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "a", out] if existing else [])


def test_progress_is_for_terminals_or_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(QWEN3, tmp_path / "silent", tiny=True)
    assert capsys.readouterr().err == ""
    synthesize(QWEN3, tmp_path / "loud", tiny=True, progress=True)
    assert capsys.readouterr().err.endswith("s \n")
