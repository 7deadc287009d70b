"""Expert buffers hold the checkpoint's bytes, each expert's own scales, and on each rank only its own experts."""

import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CT_GEMMA4, CT_QWEN3, GEMMA4, MODELOPT_QWEN3, NEMOTRON, QWEN3_6, overwrite

from moe_nvfp4 import expert_buffers
from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.expert_buffers import ExpertBuffers, expert_bytes, num_experts
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor
from moe_nvfp4.layouts import layout
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.safetensors_file import SafetensorsFile
from moe_nvfp4.survey import survey_checkpoint
from moe_nvfp4.synthesize import synthesize

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KINDS = [MODELOPT_QWEN3, CT_QWEN3, QWEN3_6, GEMMA4, CT_GEMMA4, NEMOTRON]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint") / "x"
            synthesize(name, made[name], tiny=True, seed=3, shard_bytes=100_000, progress=False)
        return made[name]

    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of its own, to be damaged."""

    def fresh(name: str) -> Path:
        synthesize(name, tmp_path / "x", tiny=True, seed=3, progress=False)
        return tmp_path / "x"

    return fresh


def load(folder: Path, **options: Any) -> ExpertBuffers:
    with Checkpoint.open(folder) as checkpoint:
        found = survey_checkpoint(checkpoint)
        return ExpertBuffers.load(checkpoint, found, device="cpu", **options)


def read_all(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def expert(tensors: Tensors, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales and multiplier as the library reads them."""
    scales = tensors[f"{module}.weight_scale"].view(torch.uint8)
    if f"{module}.weight_packed" in tensors:
        return tensors[f"{module}.weight_packed"], scales, 1 / tensors[f"{module}.weight_global_scale"].reshape(())
    return tensors[f"{module}.weight"], scales, tensors[f"{module}.weight_scale_2"]


def projections(buffers: ExpertBuffers, layer: int) -> dict[str, NVFP4Tensor]:
    experts = buffers.layers[layer]
    named = {"gate_proj": experts.gate, "up_proj": experts.up, "down_proj": experts.down}
    return {name: block for name, block in named.items() if block is not None}


def check_bits(buffers: ExpertBuffers, folder: Path) -> None:
    tensors, config = read_all(folder), None
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.config
    blocks = layout(config).experts
    assert {block.layer for block in blocks} == set(buffers.layers)
    for block in blocks:
        held = projections(buffers, block.layer)
        assert held.keys() == block.projections.keys()
        for name, part in held.items():
            for slot, logical in enumerate(buffers.placement.local(block.layer, buffers.rank)):
                codes, scales, multiplier = expert(tensors, f"{block.prefix}{logical}.{name}")
                assert torch.equal(part.codes[slot], codes)
                assert torch.equal(part.block_scales[slot], scales)
                assert torch.equal(part.global_scale[slot], multiplier)
            assert part.codes.is_contiguous() and part.block_scales.is_contiguous()
    expected = sum(expert_bytes(b) * len(buffers.placement.local(b.layer, buffers.rank)) for b in blocks)
    assert buffers.nbytes == expected


@pytest.mark.parametrize("readers", [1, 5])
@pytest.mark.parametrize("name", KINDS)
def test_load_equals_the_checkpoint(folders: Callable[[str], Path], name: str, readers: int) -> None:
    buffers = load(folders(name), readers=readers)
    check_bits(buffers, folders(name))
    assert (next(iter(buffers.layers.values())).gate is None) == (name == NEMOTRON)


@pytest.mark.parametrize("name", [MODELOPT_QWEN3, CT_QWEN3, NEMOTRON])
def test_every_expert_has_its_own_scales(folders: Callable[[str], Path], name: str) -> None:
    """The synthetic file gives gate, up and down of every expert scales that differ by up to four."""
    for layer in load(folders(name)).layers.values():
        scales = torch.stack([part.global_scale for part in layer.projections if part is not None])
        assert scales.unique().numel() == scales.numel()
        assert scales.max() / scales.min() > 2


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, int]]:
    read: list[tuple[Path, int, int]] = []
    whole = SafetensorsFile.read_into

    def recorded(self: SafetensorsFile, start: int, buffers: Any) -> None:
        read.append((self.path, start, start + sum(buffer.nbytes for buffer in buffers)))
        whole(self, start, buffers)

    monkeypatch.setattr(SafetensorsFile, "read_into", recorded)
    return read


PLACEMENTS = {
    **{f"even {n}": [tuple(range(8 * r // n, 8 * (r + 1) // n)) for r in range(n)] for n in (1, 2, 4, 8)},
    "uneven, with replicas": [(7, 0, 3), (), (1, 2, 3, 4, 5, 6), (6,)],
}


@pytest.mark.parametrize("name", [MODELOPT_QWEN3, CT_GEMMA4, NEMOTRON])
@pytest.mark.parametrize("ranks", PLACEMENTS)
def test_a_rank_reads_its_experts_only(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, ranks: str
) -> None:
    folder, slots = folders(name), tuple(PLACEMENTS[ranks])
    with Checkpoint.open(folder) as checkpoint:
        found = survey_checkpoint(checkpoint)
        placement = Placement(8, dict.fromkeys(found.experts, slots))
        if ranks.startswith("even"):
            assert placement == Placement.even(found.experts, 8, len(slots))
        read = bytes_read(monkeypatch)
        for rank, experts in enumerate(slots):
            read.clear()
            buffers = ExpertBuffers.load(checkpoint, found, device="cpu", placement=placement, rank=rank)
            spans = [(path, a, b) for path, a, b in read if a < b]
            check_bits(buffers, folder)
            for parts in found.experts.values():
                for sources in parts.values():
                    assert len(sources) == 8
                    for logical in set(range(8)) - set(experts):
                        for info in sources[logical].tensors:
                            path, end = checkpoint.files[info.file].path, info.start + info.nbytes
                            hit = [s for s in spans if s[0] == path and s[1] < end and info.start < s[2]]
                            assert not hit, f"rank {rank} read {info.name}"
            total = sum(b - a for _, a, b in spans)
            scales = sum(part.block_scales.nbytes for layer in buffers.layers.values() for part in layer.projections
                         if part is not None)  # fmt: skip
            assert total == buffers.nbytes + scales  # block scales are read once more, to check them


def refuse_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(expert_buffers, "_allocate", refuse)


def first_expert(folder: Path, leaf: str) -> str:
    return next(name for name in read_all(folder) if "experts.5." in name and name.endswith(f"up_proj.{leaf}"))


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x81, 0xB8, 0xFE])
@pytest.mark.parametrize("name", [MODELOPT_QWEN3, CT_GEMMA4])
def test_broken_block_scales(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, byte: int
) -> None:
    folder = copy(name)
    overwrite(folder, first_expert(folder, "weight_scale"), bytes([byte]), at=3)
    refuse_allocation(monkeypatch)
    with pytest.raises(CheckpointError, match=r"experts\.5\.up_proj\.weight_scale: [01] NaN and [01] negative"):
        load(folder)
    tensors = read_all(folder)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=r"experts\.5\.up_proj"):
        ExpertBuffers.from_experts(tensors, layout(checkpoint.config))
    assert tensors.keys() == read_all(folder).keys()  # nothing was taken


@pytest.mark.parametrize("byte", [0x00, 0x80, 0x01, 0x7E])
def test_odd_but_valid_block_scales(copy: Callable[[str], Path], byte: int) -> None:
    folder = copy(MODELOPT_QWEN3)
    overwrite(folder, first_expert(folder, "weight_scale"), bytes([byte]), at=3)
    check_bits(load(folder), folder)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        *[(name, value, False) for name in (MODELOPT_QWEN3, CT_QWEN3) for value in ("nan", "inf", "-inf", "-1")],
        (MODELOPT_QWEN3, "0", True),
        (MODELOPT_QWEN3, "1e-42", True),
        (CT_QWEN3, "0", False),
        (CT_QWEN3, "1e-42", False),  # its reciprocal is infinite
        (CT_QWEN3, "3e38", True),
        (CT_QWEN3, "1", True),
    ],
)
def test_global_scales(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, value: str, valid: bool
) -> None:
    folder = copy(name)
    leaf = "weight_scale_2" if name == MODELOPT_QWEN3 else "weight_global_scale"
    overwrite(folder, first_expert(folder, leaf), struct.pack("<f", float(value)))
    with Checkpoint.open(folder) as checkpoint:
        shape = layout(checkpoint.config)
    if valid:
        check_bits(load(folder), folder)
        check_bits(ExpertBuffers.from_experts(read_all(folder), shape), folder)
        return
    refuse_allocation(monkeypatch)
    with pytest.raises(CheckpointError, match=r"experts\.5\.up_proj"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"experts\.5\.up_proj"):
        ExpertBuffers.from_experts(read_all(folder), shape)


def test_experts_in_another_format(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(MODELOPT_QWEN3)
    tensors = read_all(folder)
    module = first_expert(folder, "weight").removesuffix(".weight")
    rows, columns = tensors[f"{module}.weight"].shape
    tensors[f"{module}.weight"] = torch.zeros(rows, 2 * columns, dtype=torch.bfloat16)
    del tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
    save_file(tensors, folder / "model.safetensors")
    refuse_allocation(monkeypatch)
    with pytest.raises(CheckpointError, match=r"BF16 \(1 expert weights are not NVFP4\)"):
        load(folder)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="routed experts must be NVFP4"):
        ExpertBuffers.from_experts(tensors, layout(checkpoint.config))


def test_an_incomplete_checkpoint_takes_no_memory(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(MODELOPT_QWEN3)
    tensors = read_all(folder)
    del tensors[first_expert(folder, "weight")]
    save_file(tensors, folder / "model.safetensors")
    refuse_allocation(monkeypatch)
    with pytest.raises(CheckpointError, match="weights missing"):
        load(folder)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="weights missing"):
        ExpertBuffers.from_experts(tensors, layout(checkpoint.config))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ranks", ["even 1", "even 2", "uneven, with replicas"])
def test_from_experts_equals_load(folders: Callable[[str], Path], name: str, ranks: str) -> None:
    folder, slots = folders(name), tuple(PLACEMENTS[ranks])
    with Checkpoint.open(folder) as checkpoint:
        shape = layout(checkpoint.config)
    placement = Placement(8, {block.layer: slots for block in shape.experts})
    for rank in range(len(slots)):
        tensors = read_all(folder)
        others = {n for n in tensors if ".experts." not in n or n.startswith("mtp.")}
        built = ExpertBuffers.from_experts(tensors, shape, placement=placement, rank=rank)
        assert tensors.keys() == others
        check_bits(built, folder)
        loaded = load(folder, placement=placement, rank=rank)
        for layer in loaded.layers:
            for ours, theirs in zip(loaded.layers[layer].projections, built.layers[layer].projections, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_originals_are_freed_one_by_one(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is copied, all that were copied before it are gone."""
    folder = folders(MODELOPT_QWEN3)
    tensors = {name: tensor.clone() for name, tensor in read_all(folder).items() if ".experts." in name}
    alive = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
    big = {name for name in tensors if name.endswith((".weight", ".weight_scale"))}
    counts: list[int] = []
    whole = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor, **options: Any) -> torch.Tensor:
        counts.append(sum(alive[name]() is not None for name in big))
        return whole(self, source, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    with Checkpoint.open(folder) as checkpoint:
        ExpertBuffers.from_experts(tensors, layout(checkpoint.config))
    assert len(counts) == len(big)
    assert max(count + copied for copied, count in enumerate(counts)) <= len(big) + 1
    assert not tensors and not [name for name in alive if alive[name]() is not None]


def test_a_model_without_experts(tmp_path: Path) -> None:
    synthesize("nvidia/Gemma-4-31B-IT-NVFP4", tmp_path / "x", tiny=True, progress=False)
    buffers = load(tmp_path / "x")
    assert not buffers.layers and buffers.nbytes == 0
    with Checkpoint.open(tmp_path / "x") as checkpoint:
        shape = layout(checkpoint.config)
        assert num_experts(shape) == 0
        assert not ExpertBuffers.from_experts(read_all(tmp_path / "x"), shape).layers
