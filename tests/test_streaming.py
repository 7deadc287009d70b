"""Bytes from files to targets: every path, every boundary, and errors that stop all readers."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import write_raw

from moe_nvfp4 import streaming
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.progress import Progress
from moe_nvfp4.safetensors_file import SafetensorsFile
from moe_nvfp4.streaming import Transfer, stream

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Odd sizes, so that after the first one most starts are unaligned in a file without order."""
    torch.manual_seed(1)
    return {
        "codes": torch.randint(0, 256, (7, 13), dtype=torch.uint8),
        "scales": torch.randint(0, 0x7F, (5, 3), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "half": torch.randn(9, 11).bfloat16(),
        "single": torch.randn(3, 5),
        "scalar": torch.tensor(4.25),
        "empty": torch.empty(0, 4),
        "long": torch.randint(-(2**40), 2**40, (6,)),
    }


def write_unaligned(path: Path, tensors: dict[str, torch.Tensor]) -> SafetensorsFile:
    """In the order given and with odd starts, which the library's own writer avoids."""
    names = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        span = [len(data), len(data) + len(raw)]
        dtype = names.get(tensor.dtype, "I64")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": span}
        data += raw
    return SafetensorsFile(write_raw(path, header, data))


def widened(dtype: torch.dtype, wide: torch.dtype | None) -> torch.dtype:
    if dtype == torch.float8_e4m3fn:
        return torch.uint8
    return wide if wide and dtype.is_floating_point else dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [8, 16, 40, 64, 1 << 20])
@pytest.mark.parametrize("wide", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("readers", [1, 3])
def test_targets_equal_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, chunk: int, wide: torch.dtype | None, readers: int
) -> None:
    monkeypatch.setattr(streaming, "CHUNK_BYTES", chunk)
    tensors = mixed_tensors()
    file = write_unaligned(tmp_path / "x", tensors)
    targets = {
        name: torch.empty(tensor.shape, dtype=widened(tensor.dtype, wide), device=device)
        for name, tensor in tensors.items()
    }
    transfers = [Transfer(file.tensors[name], target) for name, target in reversed(targets.items())]
    with Progress("test", 1, enabled=False) as progress:
        stream([file], transfers, readers=readers, progress=progress)
    for name, tensor in tensors.items():
        wanted = tensor.view(torch.uint8) if name == "scales" else tensor.to(targets[name].dtype)
        assert torch.equal(targets[name].cpu(), wanted), name
    assert progress.done == sum(info.nbytes for info in file.tensors.values())


def test_parts_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one block come from different files; tensors in between are not read."""
    monkeypatch.setattr(streaming, "MAX_VECTORS", 3)
    block, files, transfers = torch.empty(20, 32, dtype=torch.uint8), [], []
    for number in range(2):
        rows = {f"r{i:02}": torch.full((32,), 100 * number + i, dtype=torch.uint8) for i in range(15)}
        save_file(rows, tmp_path / f"{number}")
        files.append(SafetensorsFile(tmp_path / f"{number}", number))
        kept = [i for i in range(15) if i % 3]
        transfers += [Transfer(files[-1].tensors[f"r{i:02}"], block[10 * number + n]) for n, i in enumerate(kept)]
    read: list[int] = []
    whole = SafetensorsFile.read_into
    monkeypatch.setattr(
        SafetensorsFile,
        "read_into",
        lambda self, start, buffers: (read.append(sum(b.nbytes for b in buffers)), whole(self, start, buffers))[1],
    )
    stream(files, transfers)
    assert block[:, 0].tolist() == [100 * n + i for n in range(2) for i in range(15) if i % 3]
    assert (block == block[:, :1]).all()
    assert sum(read) == 20 * 32
    assert sorted(read) == [64] * 10  # two neighbours at a time


def test_neighbours_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.full((50,), i, dtype=torch.uint8) for i in range(10)}
    file = write_unaligned(tmp_path / "x", tensors)
    calls: list[int] = []
    whole = SafetensorsFile.read_into
    monkeypatch.setattr(
        SafetensorsFile,
        "read_into",
        lambda self, start, buffers: (calls.append(len(buffers)), whole(self, start, buffers))[1],
    )
    targets = [torch.empty(50, dtype=torch.uint8) for _ in tensors]
    stream([file], [Transfer(info, target) for info, target in zip(file.tensors.values(), targets, strict=True)])
    assert calls == [10]
    assert [int(target[0]) for target in targets] == list(range(10))


def test_nothing_to_do() -> None:
    stream([], [])


def test_targets_made_in_inference_mode(tmp_path: Path) -> None:
    file = write_unaligned(tmp_path / "x", {"half": torch.ones(40).bfloat16()})
    with torch.inference_mode():
        target = torch.empty(40)
        stream([file], [Transfer(file.tensors["half"], target)])
    assert target.eq(1).all()


def test_a_target_that_does_not_fit(tmp_path: Path) -> None:
    file = write_unaligned(tmp_path / "x", {"half": torch.ones(4, 6).bfloat16()})
    for target in (torch.empty(23), torch.empty(6, 4).T):
        with pytest.raises(AssertionError, match="half: 48 bytes do not fill"):
            stream([file], [Transfer(file.tensors["half"], target)])


def test_a_file_that_shrank(tmp_path: Path) -> None:
    for dtype in (torch.uint8, torch.int32):
        file = write_unaligned(tmp_path / "x", {"a": torch.ones(1000, dtype=torch.uint8)})
        os.truncate(tmp_path / "x", 500)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            stream([file], [Transfer(file.tensors["a"], torch.empty(1000, dtype=dtype))])


def test_an_error_stops_the_other_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 8)
    file = write_unaligned(tmp_path / "x", {"a": torch.ones(8000, dtype=torch.uint8)})
    calls = 0

    def fail_on_the_third(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise CheckpointError("third")
        time.sleep(0.3 if calls == 1 else 0.002)  # the first is still at work when the third fails

    monkeypatch.setattr(SafetensorsFile, "read_into", fail_on_the_third)
    with pytest.raises(CheckpointError, match="third"):
        stream([file], [Transfer(file.tensors["a"], torch.empty(8000, dtype=torch.uint8))], readers=4)
    assert calls < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("experts", 2_000_000_000, enabled=True) as progress:
        progress.advance(1_000_000_000)
        progress.advance(1_000_000_000)
    error = capsys.readouterr().err
    assert "experts" in error and "2.00/2.00 GB" in error and error.endswith("\n")
    with Progress("nothing", 0, enabled=True):
        pass
    with Progress("silent", 10) as progress:  # no terminal here
        progress.advance(20)
    assert "silent" not in capsys.readouterr().err
