"""The container: whatever the bytes are, the reader agrees with the safetensors library or raises CheckpointError."""

import contextlib
import json
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import write_raw

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.safetensors_file import TORCH_DTYPES, SafetensorsFile

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
DATA = bytes(range(24))


def opened(path: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(path)
    tensors = {name: file.tensor(info).clone() for name, info in file.tensors.items() if info.dtype in TORCH_DTYPES}
    file.close()
    return tensors


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | changes}


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    spans = {"a": first, "b": second}
    return {n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in spans.items()}


def test_minimal_file(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", GOOD, DATA)
    expected = torch.frombuffer(bytearray(DATA), dtype=torch.float32).view(2, 3)
    assert torch.equal(opened(path)["a"], expected)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "starts with b''"),
        (b"{", "not JSON"),
        (b"[]", "starts with"),
        (b' {"__metadata__":{}}', "starts with"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b'{"\\ud800": {"dtype":"U8","shape":[24],"data_offsets":[0,24]}}', "not JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"__metadata__": ["a"]}, "__metadata__"),
        ({"a": 1}, "'a'"),
        ({"a": None}, "'a'"),
        ({"a": {}}, "'a'"),
        (entry(more=1), "'a'"),
        (entry(dtype="F33"), "dtype 'F33'"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(dtype="x" * 10_000), "dtype"),
        (entry(shape=6), "shape 6"),
        (entry(shape=[True, 6]), "shape"),
        (entry(shape=[2.0, 3]), "shape"),
        (entry(shape=[-2, -3]), "shape"),
        (entry(shape=[2**63, 0]), "shape"),
        (entry(shape=[10**100, 0]), "shape"),
        (entry(shape=["2", 3]), "shape"),
        (entry(shape=[1] * 8 + [6]), "shape"),
        (entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), "shape"),
        (entry(shape=[2, 4]), "data_offsets span 24"),
        (entry(shape=[2**47] * 8), "data_offsets span 24"),
        (entry(shape=[]), "data_offsets span 24"),
        (entry(data_offsets=[24, 0]), "data_offsets"),
        (entry(data_offsets=[-24, 0]), "data_offsets"),
        (entry(data_offsets=[0, 24, 48]), "data_offsets"),
        (entry(data_offsets=[0, 2**63]), "data_offsets"),
        (entry(data_offsets=[False, 24]), "data_offsets"),
        (entry(data_offsets=[0, 24.0]), "data_offsets"),
        (entry(data_offsets="024"), "data_offsets"),
        (entry(dtype="F4", shape=[49]), "data_offsets span 24"),
        (entry(shape=[4, 3], data_offsets=[0, 48]), "truncated"),
        (entry(dtype="U8", shape=[2**40], data_offsets=[0, 2**40]), "truncated"),
        (entry(shape=[2], data_offsets=[0, 8]), "longer than its tensors"),
        (entry(shape=[5], data_offsets=[4, 24]), "leaves a gap"),
        (two([0, 16], [8, 24]), "overlaps"),
        (two([0, 12], [0, 12]), "overlaps"),
        (two([0, 8], [16, 24]), "leaves a gap"),
        (two([0, 24], [8, 16]), "overlaps"),
        ({}, "longer than its tensors"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, bytes) else None,
)
def test_broken_headers(tmp_path: Path, header: Any, message: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, DATA)
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as error:
        SafetensorsFile(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("length", [0, 1, 10, 2**20, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_lying_length(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "x", GOOD, DATA, length=length)
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40])
def test_truncated(tmp_path: Path, size: int) -> None:
    path = write_raw(tmp_path / "x", GOOD, DATA)
    os.truncate(path, size)
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "absent", tmp_path / ("x" * 5000)):
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    with pytest.raises(CheckpointError):
        SafetensorsFile(Path("/dev/zero"))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", GOOD, DATA)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        SafetensorsFile(path)


def test_a_false_claim_allocates_nothing(tmp_path: Path) -> None:
    claims = [
        (entry(dtype="U8", shape=[2**40], data_offsets=[0, 2**40]), None),
        (entry(dtype="U8", shape=[2**20] * 2, data_offsets=[0, 2**40]), None),
        (GOOD, 2**40),
        (GOOD, 90_000_000),
    ]
    for header, length in claims:
        path = write_raw(tmp_path / "x", header, DATA, length=length)
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def test_zero_size_tensors(tmp_path: Path) -> None:
    header = {
        "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]},
        "some": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]},
        "wide": {"dtype": "BF16", "shape": [2**40, 0], "data_offsets": [24, 24]},
    }
    tensors = opened(write_raw(tmp_path / "x", header, DATA))
    assert tensors["none"].shape == (0, 7)
    assert tensors["wide"].shape == (2**40, 0)
    assert tensors["some"].tolist() == list(DATA)
    empty = SafetensorsFile(write_raw(tmp_path / "y", {"none": header["none"]}))
    assert empty.tensor(empty.tensors["none"]).numel() == 0


@pytest.mark.parametrize("padding", range(8))
def test_unaligned_data(tmp_path: Path, padding: int) -> None:
    raw = json.dumps(GOOD).encode() + b" " * padding
    file = SafetensorsFile(write_raw(tmp_path / "x", raw, DATA))
    assert file.tensor(file.tensors["a"]).data_ptr() % 4 == 0
    tensors = opened(file.path)
    assert torch.equal(tensors["a"].view(torch.uint8).flatten(), torch.tensor(list(DATA), dtype=torch.uint8))


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    wanted = {
        f"{dtype}": torch.randint(0, 2, (3, 5)).to(dtype) if dtype == torch.bool else torch.randn(3, 5).to(dtype)
        for dtype in TORCH_DTYPES.values()
    }
    wanted["scalar"] = torch.tensor(2.5)
    save_file(wanted, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = opened(tmp_path / "x.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8) if tensor.ndim else found[name],
                           tensor.view(torch.uint8) if tensor.ndim else tensor)  # fmt: skip


def test_a_tensor_is_lazy_and_private(tmp_path: Path) -> None:
    size = 1 << 32  # a hole: reading it would take 4 GB
    path = write_raw(tmp_path / "x", {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, size)
    before = path.read_bytes() if size < 1 << 20 else None
    assert before is None
    file = SafetensorsFile(path)
    started = time.perf_counter()
    tensor = file.tensor(file.tensors["a"])
    assert time.perf_counter() - started < 1
    assert tensor.numel() == size
    again = file.tensor(file.tensors["a"])
    assert tensor.data_ptr() == again.data_ptr()
    tensor[5] = 7
    with open(path, "rb") as raw:
        raw.seek(file.tensors["a"].start)
        assert raw.read(10) == bytes(10)
    file.close()
    assert tensor[5] == 7  # the mapping outlives the file
    with pytest.raises(CheckpointError, match="closed"):
        file.tensor(file.tensors["a"])
    file.close()


def test_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    file = SafetensorsFile(write_raw(tmp_path / "x", entry(dtype="F6_E2M3", shape=[32]), DATA))
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        file.tensor(file.tensors["a"])


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", GOOD, DATA)
    file = SafetensorsFile(path)
    info = file.tensors["a"]
    os.truncate(path, info.start + 10)
    parts = [bytearray(8), bytearray(0), bytearray(16)]
    with pytest.raises(CheckpointError, match="ends at byte"):
        file.read_into(info.start, [memoryview(part) for part in parts])
    assert parts[0] == DATA[:8]
    file.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.read_into(0, [memoryview(bytearray(1))])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SafetensorsFile(write_raw(tmp_path / "x", GOOD, DATA))
    whole = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        limited = memoryview(bytearray(5))
        count = whole(fd, [limited], offset)
        for buffer in buffers:
            taken = min(count, buffer.nbytes)
            buffer[:taken] = limited[:taken]
            limited, count = limited[taken:], count - taken
        return 5 - count if offset + 5 <= file.size else file.size - offset

    monkeypatch.setattr(os, "preadv", short)
    parts = [bytearray(n) for n in (1, 7, 0, 3, 9)]
    file.read_into(file.tensors["a"].start, [memoryview(part) for part in parts])
    assert b"".join(parts) == DATA[:20]


def agrees_with_the_library(path: Path) -> None:
    started = time.perf_counter()
    tracemalloc.start()
    file = None
    with contextlib.suppress(CheckpointError):
        file = SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - started < 1
    assert peak < 100 * path.stat().st_size + (1 << 18)  # Python objects for the header's text
    if file is None:
        return
    with safetensors.safe_open(path, "pt") as library:
        assert set(library.keys()) == set(file.tensors)
        for name, info in file.tensors.items():
            if info.dtype in TORCH_DTYPES and 0 not in info.shape:
                theirs, ours = library.get_tensor(name), file.tensor(info)
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype
                assert ours.reshape(-1).view(torch.uint8).tolist() == theirs.reshape(-1).view(torch.uint8).tolist()
    file.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


FUZZ = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes(scratch: Path, data: bytes, framed: bool) -> None:
    scratch.write_bytes(struct.pack("<Q", min(len(data), 60)) + data if framed else data)
    agrees_with_the_library(scratch)


def valid_file() -> tuple[dict[str, Any], bytes]:
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for name, dtype, shape, begin, end in [
            ("m.weight", "U8", [4, 8], 0, 32),
            ("m.weight_scale", "F8_E4M3", [4, 1], 32, 36),
            ("m.weight_scale_2", "F32", [], 36, 40),
            ("n.weight", "BF16", [3, 2], 40, 52),
            ("empty", "F32", [0, 3], 52, 52),
        ]
    }
    return header, bytes(range(52))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(scratch: Path, flips: list[tuple[int, int]]) -> None:
    header, data = valid_file()
    content = bytearray(write_raw(scratch, header, data).read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    scratch.write_bytes(content)
    agrees_with_the_library(scratch)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(0, 60), st.floats(), st.text(max_size=8),
        st.sampled_from(["F32", "U8", "BF16", "F4", "dtype", "shape", "data_offsets", "__metadata__", "m.weight"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def slots(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [slot for key in keys for slot in slots(value[key])]


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 1000), JSON), min_size=1, max_size=3), st.integers(-4, 60))
def test_random_values_in_the_header(scratch: Path, changes: list[tuple[int, Any]], cut: int) -> None:
    header, data = valid_file()
    for place, value in changes:
        places = slots(header)
        container, key = places[place % len(places)]
        container[key] = value
    write_raw(scratch, header, data[: len(data) - cut] if 0 < cut < 4 else data)
    agrees_with_the_library(scratch)


def test_rearranged_spans(scratch: Path) -> None:
    """Small offsets at random: most overlap or leave gaps, a few are right."""
    chance, accepted = random.Random(0), 0
    for _ in range(400):
        ends = [chance.randint(0, 3) for _ in range(4)]
        header = {
            name: {"dtype": "U8", "shape": [abs(b - a)], "data_offsets": [a, b]}
            for name, a, b in zip("xyz", ends, ends[1:], strict=False)
        }
        write_raw(scratch, header, bytes(3))
        agrees_with_the_library(scratch)
        with contextlib.suppress(CheckpointError):
            SafetensorsFile(scratch).close()
            accepted += 1
    assert accepted > 3
