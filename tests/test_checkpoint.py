"""Folders of safetensors: shards, indices, configs, and everything about them that can be wrong."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import INDEX, write_raw

from moe_nvfp4.checkpoint import Checkpoint, read_json
from moe_nvfp4.errors import CheckpointError

FIRST = {"a": torch.arange(6).view(2, 3), "b.c": torch.tensor(1.5)}
SECOND = {"d": torch.tensor([1, 2], dtype=torch.uint8)}
SHARDS = {"x-1.safetensors": FIRST, "x-2.safetensors": SECOND}


def write(folder: Path, files: dict[str, dict[str, torch.Tensor]], **texts: Any) -> Path:
    """A checkpoint; `texts` are JSON files, by their names without suffix, or None for no such file."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    for name, value in ({"config": {"model_type": "x"}} | texts).items():
        path = folder / (INDEX if name == "index" else f"{name}.json")
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif value is not None:
            path.write_text(json.dumps(value))
    return folder


def weight_map(**changes: Any) -> dict[str, Any]:
    return {"weight_map": {name: shard for shard, held in SHARDS.items() for name in held} | changes}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_one_file(tmp_path: Path) -> None:
    for name in ("model.safetensors", "other.safetensors"):
        folder = write(tmp_path / name, {name: FIRST})
        with Checkpoint.open(str(folder)) as checkpoint:
            assert checkpoint.tensors.keys() == FIRST.keys()
            assert checkpoint.nbytes == 6 * 8 + 4
            assert checkpoint.config == {"model_type": "x"}
            assert torch.equal(checkpoint.tensor("a"), FIRST["a"])
            assert checkpoint.tensor("b.c") == 1.5
            assert checkpoint.read(checkpoint.tensors["b.c"]) == torch.tensor(1.5).numpy().tobytes()
            assert checkpoint.where(checkpoint.tensors["a"]) == f"{name}: a"
            assert not checkpoint.unindexed
            with pytest.raises(CheckpointError, match="no tensor 'z'"):
                checkpoint.tensor("z")


def test_shards(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, SHARDS, index=weight_map())) as checkpoint:
        for name, tensor in (FIRST | SECOND).items():
            assert torch.equal(checkpoint.tensor(name), tensor)
        assert [file.path.name for file in checkpoint.files] == list(SHARDS)
        assert {info.file for info in checkpoint.tensors.values()} == {0, 1}


def test_shards_in_a_folder_below_and_through_links(tmp_path: Path) -> None:
    """The hub's cache links every file of a snapshot to a blob elsewhere."""
    write(tmp_path / "blobs", SHARDS)
    folder = write(tmp_path / "snapshot", {}, index=weight_map(d="below/x-2.safetensors"))
    (folder / "below").mkdir()
    (folder / "x-1.safetensors").symlink_to("../blobs/x-1.safetensors")
    (folder / "below/x-2.safetensors").symlink_to(tmp_path / "blobs/x-2.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensor("d").tolist() == [1, 2]


def test_unindexed_tensors_are_told_apart(tmp_path: Path) -> None:
    index = weight_map()
    del index["weight_map"]["b.c"]
    with Checkpoint.open(write(tmp_path, SHARDS, index=index)) as checkpoint:
        assert checkpoint.unindexed == ["b.c"]
        assert "b.c" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (weight_map(d="absent.safetensors"), "'absent.safetensors', which is not in"),
        (weight_map(d="../x-2.safetensors"), "inside the checkpoint's folder"),
        (weight_map(d="below/../../x-2.safetensors"), "inside the checkpoint's folder"),
        (weight_map(d="/etc/x-2.safetensors"), "inside the checkpoint's folder"),
        (weight_map(d="..\\x-2.safetensors"), "inside the checkpoint's folder"),
        (weight_map(d="x\0.safetensors"), "inside the checkpoint's folder"),
        (weight_map(d=""), "inside the checkpoint's folder"),
        (weight_map(d="x-2.bin"), "only .safetensors"),
        (weight_map(d="."), "inside the checkpoint's folder"),
        (weight_map(d="folder.safetensors"), "not a regular file"),
        (weight_map(d="\ud800.safetensors"), "which is not in"),
        (weight_map(d="x" * 300 + ".safetensors"), "which is not in"),
        (weight_map(d=7), "weight_map: 7; expected a file name"),
        (weight_map(d=["x-2.safetensors"]), "expected a file name"),
        (weight_map(d=None), "expected a file name"),
        (weight_map(e="x-2.safetensors"), "places 'e' in x-2.safetensors, which does not hold it"),
        (weight_map(d="x-1.safetensors"), "places 'd' in x-1.safetensors"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({}, "weight_map"),
        ([], "expected an object"),
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
    ],
)
def test_broken_index(tmp_path: Path, index: Any, message: str) -> None:
    folder = write(tmp_path / "checkpoint", SHARDS, index=index)
    save_file(SECOND, tmp_path / "x-2.safetensors")
    (folder / "folder.safetensors").mkdir()
    before = descriptors()
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    assert message in str(error.value)
    str(error.value).encode()
    assert len(str(error.value)) < 700
    assert descriptors() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1], "expected an object"),
        ("text", "expected an object"),
    ],
)
def test_broken_config(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(write(tmp_path, {"model.safetensors": FIRST}, config=config))


def test_json_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, {"model.safetensors": FIRST}, config=None)
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(folder)
    monkeypatch.setattr("moe_nvfp4.checkpoint.MAX_JSON_BYTES", 10)
    (folder / "long.json").write_text('{"a": "long enough"}')
    with pytest.raises(CheckpointError, match="at most 10 bytes"):
        read_json(folder / "long.json")


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="0 safetensors files"):
        Checkpoint.open(write(tmp_path / "none", {}))
    with pytest.raises(CheckpointError, match="2 safetensors files and no"):
        Checkpoint.open(write(tmp_path / "two", SHARDS))
    file = tmp_path / "two/x-1.safetensors"
    with pytest.raises(CheckpointError, match="a file; expected the checkpoint's folder"):
        Checkpoint.open(file)
    for path in (tmp_path / "absent", "a\0b", "x" * 5000, "~nobody-of-this-name/x", ""):
        with pytest.raises(CheckpointError):
            Checkpoint.open(path) if path else Checkpoint.open(tmp_path)


def test_hub_id_without_the_hub() -> None:
    with pytest.raises(CheckpointError, match=r"^nobody/no-such-model: no such folder here") as error:
        Checkpoint.open("nobody/no-such-model")
    assert "\n" not in str(error.value)


def test_quantization_settings(tmp_path: Path) -> None:
    def settings(**texts: Any) -> Any:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        with Checkpoint.open(write(tmp_path / "x", {"model.safetensors": FIRST}, **texts)) as checkpoint:
            return checkpoint.quantization

    config, nested = {"quantization_config": {"quant_algo": "B"}}, {"text_config": {}}
    nested["text_config"] = {"quantization_config": {"quant_algo": "C"}}
    both = {"quantization": {"quant_algo": "A"}}
    assert settings(config=config, hf_quant_config=both) == {"quant_algo": "A"}
    assert settings(config=config) == {"quant_algo": "B"}
    assert settings(config=nested) == {"quant_algo": "C"}
    assert settings(config={"quantization_config": None, "text_config": []}) == {}
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
        settings(hf_quant_config={"quantization": []})
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
        settings(hf_quant_config=b"{")


def test_generation_config(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, {"model.safetensors": FIRST})) as checkpoint:
        assert checkpoint.generation_config == {}
    write(tmp_path, {}, generation_config={"eos_token_id": 3})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.generation_config == {"eos_token_id": 3}


def test_close_leaves_no_descriptor(tmp_path: Path) -> None:
    folder, before = write(tmp_path, SHARDS, index=weight_map()), descriptors()
    checkpoint = Checkpoint.open(folder)
    assert descriptors() == before + 2
    tensor = checkpoint.tensor("a")
    checkpoint.close()
    checkpoint.close()
    assert torch.equal(tensor, FIRST["a"])
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("a")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(checkpoint.tensors["a"])
    del tensor
    assert descriptors() == before


def test_failing_half_way_leaves_no_descriptor(tmp_path: Path) -> None:
    folder, before = write(tmp_path, SHARDS, index=weight_map()), descriptors()
    write_raw(folder / "x-2.safetensors", b"{}", b"too long")
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors"):
        Checkpoint.open(folder)
    assert descriptors() == before
