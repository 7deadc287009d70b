"""The doctor: sound checkpoints of every published kind, and planted defects, each found and named."""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_nvfp4.cache import CacheSettings
from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.dense_weights import load_dense
from moe_nvfp4.doctor import Report, examine, render
from moe_nvfp4.doctor_report import WIDTH
from moe_nvfp4.doctor_scales import kind_of
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.expert_buffers import ExpertBuffers
from moe_nvfp4.layouts import layout
from moe_nvfp4.memory import plan_memory
from moe_nvfp4.models import model_config
from moe_nvfp4.published import published, published_names
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.safetensors_file import SafetensorsFile
from moe_nvfp4.scales import as_multiplier, block_scale_stats
from moe_nvfp4.survey import survey_checkpoint
from moe_nvfp4.synthesize import synthesize
from moe_nvfp4.weight_source import normalise

MODELOPT = "nvidia/Qwen3-30B-A3B-NVFP4"
COMPRESSED = "RedHatAI/Qwen3-30B-A3B-NVFP4"
MIXED = "nvidia/Qwen3.6-35B-A3B-NVFP4"
EXPERT = "model.layers.1.mlp.experts.3"
NAN = struct.pack("<f", math.nan)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = MODELOPT, **options: Any) -> Path:
        out = tmp_path / name.replace("/", "-")
        synthesize(name, out, tiny=True, progress=False, **options)
        return out

    return write


def stored(folder: Path, tensor: str) -> bytes:
    with Checkpoint.open(folder) as checkpoint:
        return bytes(checkpoint.read(checkpoint.tensors[tensor]))


def patch(folder: Path, values: Mapping[str, bytes], offset: int = 0) -> None:
    """Overwrites the first bytes of tensors in their file."""
    with Checkpoint.open(folder) as checkpoint:
        for name, value in values.items():
            info = checkpoint.tensors[name]
            assert offset + len(value) <= info.nbytes
            with open(checkpoint.files[info.file].path, "r+b") as file:
                file.seek(info.start + offset)
                file.write(value)


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def load(folder: Path) -> None:
    """What the doctor foretells."""
    with Checkpoint.open(folder) as checkpoint:
        found = survey_checkpoint(checkpoint)
        found.require_complete(str(folder))
        ExpertBuffers.load(checkpoint, found, device="cpu", progress=False)
        load_dense(checkpoint, found, device="cpu", dtype=torch.bfloat16, progress=False)


def said(items: Sequence[str], *words: str) -> None:
    """One of the messages has all the words."""
    assert any(all(word in item for word in words) for item in items), f"{words} not in {items}"


def consistent(report: Report) -> Report:
    """What holds of every report: it goes through JSON and onto a terminal."""
    content = report.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    text = render(report)
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.splitlines())
    assert f"Verdict: {report.verdict}" in text
    return report


@pytest.mark.parametrize("name", published_names())
def test_published_kinds_are_sound(name: str, make: Callable[..., Path]) -> None:
    folder = make(name)
    load(folder)
    report = consistent(examine(folder))
    assert (report.verdict, report.reasons, report.remarks) == ("sound", (), ())
    scaled = published(name).scaled(tiny=True)
    manifest = scaled.manifest()
    assert report.tensors == len(manifest) and report.nbytes == scaled.total_bytes()
    assert report.runs == (scaled.layout.model_type != "nemotron_h")
    blocks = scaled.layout.experts
    assert (report.experts.layers, report.experts.per_layer) == (len(blocks), blocks[0].count if blocks else 0)
    routed = sum(part.count for part in report.parts if part.kind.startswith("routed experts"))
    assert routed == sum(block.count * len(block.projections) for block in blocks)
    assert report.conventions.kv_scales == sum(name.endswith(("k_scale", "v_scale")) for name in manifest)
    assert report.conventions.input_scales == report.conventions.nvfp4_weights
    divides = "compressed-tensors" if "RedHatAI" in name else "ModelOpt"
    assert report.conventions.dialect == divides
    scales = [row.scales for row in report.block_scales]
    bytes_of_scales = sum(
        math.prod(spec.shape)
        for key, spec in manifest.items()
        if key.endswith(".weight_scale") and len(spec.shape) == 2 and not normalise(key).startswith("mtp")
    )
    assert sum(scales) == bytes_of_scales


def test_every_parameter_of_the_layouts_has_a_kind() -> None:
    kinds = {kind_of(normalise(name)) for name in published(MIXED).layout.parameters}
    assert kinds >= {"attention q", "linear attention", "router", "shared expert", "embedding", "lm_head", "norms"}
    assert {"router", "mamba", "shared expert"} <= {
        kind_of(normalise(name)) for name in published("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4").layout.parameters
    }


@pytest.mark.parametrize("byte, what", [(0x7F, "1 NaN"), (0xFF, "1 NaN"), (0x81, "1 negative"), (0xFE, "1 negative")])
@pytest.mark.parametrize("weight", [f"{EXPERT}.up_proj", "model.layers.0.self_attn.o_proj"])
def test_bad_block_scale(byte: int, what: str, weight: str, make: Callable[..., Path]) -> None:
    folder = make()
    patch(folder, {f"{weight}.weight_scale": bytes([byte])}, offset=5)
    report = consistent(examine(folder))
    assert report.broken
    said(report.reasons, what, weight)
    with pytest.raises(CheckpointError, match="block scales"):
        load(folder)


@pytest.mark.parametrize(
    "name, leaf, value",
    [
        (MODELOPT, "weight_scale_2", math.nan),
        (MODELOPT, "weight_scale_2", math.inf),
        (MODELOPT, "weight_scale_2", -1.0),
        (COMPRESSED, "weight_global_scale", 0.0),
        (COMPRESSED, "weight_global_scale", 1e-40),
        (COMPRESSED, "weight_global_scale", math.nan),
    ],
)
def test_bad_global_scale(name: str, leaf: str, value: float, make: Callable[..., Path]) -> None:
    folder = make(name)
    patch(folder, {f"{EXPERT}.down_proj.{leaf}": struct.pack("<f", value)})
    report = consistent(examine(folder))
    said(report.reasons, "global scales", f"{EXPERT}.down_proj")
    (row,) = (row for row in report.global_scales if row.kind == "routed experts down")
    assert row.nan + row.infinite + row.negative == 1 and row.nan == math.isnan(value)
    assert row.smallest is not None and row.smallest > 0
    with pytest.raises(CheckpointError, match="quantise again"):
        load(folder)


def test_bad_fp8_scale(make: Callable[..., Path]) -> None:
    folder = make(MIXED)
    module = "model.language_model.layers.0.linear_attn.out_proj"
    patch(folder, {f"{module}.weight_scale": NAN})
    said(consistent(examine(folder)).reasons, "FP8", module)
    with pytest.raises(CheckpointError, match="FP8 scales"):
        load(folder)


def test_bad_kv_scale_is_a_remark(make: Callable[..., Path]) -> None:
    folder = make()
    patch(folder, {"model.layers.0.self_attn.k_proj.k_scale": NAN})
    report = consistent(examine(folder))
    assert report.verdict == "sound, with remarks"
    said(report.remarks, "KV-cache", "layers.0.self_attn.k_proj.k_scale")


def test_experts_with_zero_scales_are_dead(make: Callable[..., Path]) -> None:
    folder = make()
    size = len(stored(folder, f"{EXPERT}.gate_proj.weight_scale"))
    patch(folder, {f"{EXPERT}.gate_proj.weight_scale": bytes(size)})
    patch(folder, {"model.layers.0.mlp.experts.0.up_proj.weight_scale_2": bytes(4)})
    report = consistent(examine(folder))
    assert set(report.dead_experts) == {
        f"{EXPERT}: gate_proj all block scales 0",
        "model.layers.0.mlp.experts.0: up_proj global scale 0",
    }
    assert report.verdict == "sound, with remarks"
    said(report.remarks, "dead experts", "(2)", EXPERT)
    assert not any("erase" in remark for remark in report.remarks)
    load(folder)
    (row,) = (row for row in report.block_scales if row.kind == "routed experts gate")
    assert (row.zero, row.affected_weights, row.worst) == (size, 1, f"{EXPERT}.gate_proj")


def test_zero_and_subnormal_block_scales(make: Callable[..., Path]) -> None:
    folder = make()
    patch(folder, {f"{EXPERT}.gate_proj.weight_scale": bytes([0x00, 0x80, 0x07, *[0x01] * 20])})
    report = consistent(examine(folder))
    (row,) = (row for row in report.block_scales if row.kind == "routed experts gate")
    assert (row.zero, row.subnormal, row.negative, row.nan) == (2, 21, 0, 0)
    said(report.remarks, "routed experts gate", "2 of", "zero")
    said(report.remarks, "routed experts gate", "21 of", "subnormal")
    assert not report.broken


def test_uncalibrated_expert(make: Callable[..., Path]) -> None:
    folder = make(COMPRESSED)
    patch(folder, {f"{EXPERT}.{p}_proj.weight_global_scale": struct.pack("<f", 1) for p in ("gate", "up")})
    report = consistent(examine(folder))
    assert report.uncalibrated_experts == (f"{EXPERT}: gate_proj global scale 1.0, up_proj global scale 1.0",)
    said(report.remarks, "no calibration data (1)", EXPERT)


@pytest.mark.parametrize("name, leaf", [(MODELOPT, "weight_scale_2"), (COMPRESSED, "weight_global_scale")])
def test_ratios_of_gate_and_up(name: str, leaf: str, make: Callable[..., Path]) -> None:
    folder = make(name)
    with Checkpoint.open(folder) as checkpoint:
        names = [key for key in checkpoint.tensors if key.endswith(leaf)]
    patch(folder, dict.fromkeys(names, struct.pack("<f", 0.5)))
    equal = consistent(examine(folder))
    assert [row.differing for row in equal.ratios] == [0, 0]
    assert "merging them loses nothing" in render(equal)
    patch(folder, {f"{EXPERT}.gate_proj.{leaf}": struct.pack("<f", 4)})
    report = consistent(examine(folder))
    experts, attention = report.ratios
    assert (experts.differing, experts.median, experts.largest, experts.largest_at) == (1, 8, 8, EXPERT)
    assert attention.kind == "attention q/k/v" and attention.differing == 0
    assert "by a factor of up to 8." in render(report)


def test_missing_tensors(make: Callable[..., Path]) -> None:
    folder = make()
    rewrite(folder, lambda tensors: [tensors.pop(f"{EXPERT}.up_proj.weight"), tensors.pop("model.norm.weight")])
    report = consistent(examine(folder))
    assert set(report.missing) == {f"{normalise(EXPERT)}.up_proj.weight", "norm.weight"}
    said(report.reasons, "missing", "norm.weight")
    rewrite(folder, lambda tensors: tensors.pop(f"{EXPERT}.down_proj.weight_scale"))
    said(consistent(examine(folder)).reasons, f"{EXPERT}.down_proj", "without weight_scale")


def test_unused_tensors(make: Callable[..., Path]) -> None:
    folder = make()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.mlp.extra\x1b[31m.weight": torch.zeros(3)}))
    report = consistent(examine(folder))
    assert report.unexpected == ("model.layers.0.mlp.extra\x1b[31m.weight",)
    said(report.reasons, "nothing uses", "mlp.extra")
    assert "\x1b" not in render(report)


def test_wrong_shape(make: Callable[..., Path]) -> None:
    folder = make()
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)}))
    said(consistent(examine(folder)).reasons, "model.norm.weight", "shape [3]")


def test_experts_in_another_format(make: Callable[..., Path]) -> None:
    def widen(tensors: Tensors) -> None:
        rows, half = tensors[f"{EXPERT}.up_proj.weight"].shape
        for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
            tensors.pop(f"{EXPERT}.up_proj.{leaf}")
        tensors[f"{EXPERT}.up_proj.weight"] = torch.zeros(rows, 2 * half, dtype=torch.bfloat16)

    folder = make()
    rewrite(folder, widen)
    report = consistent(examine(folder))
    said(report.reasons, "not NVFP4 but BF16", f"{EXPERT}.up_proj")
    with pytest.raises(CheckpointError, match="must be NVFP4"):
        load(folder)
    assert ("routed experts up", "BF16", 1) in {(part.kind, part.algorithm, part.count) for part in report.parts}


def test_missing_input_scales_are_a_remark(make: Callable[..., Path]) -> None:
    folder = make()
    rewrite(folder, lambda tensors: tensors.pop(f"{EXPERT}.up_proj.input_scale"))
    said(consistent(examine(folder)).remarks, "1 of", "no input scale", f"{EXPERT}.up_proj")

    def drop_all(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("input_scale")]:
            del tensors[name]

    rewrite(folder, drop_all)  # an export for weight-only use
    report = consistent(examine(folder))
    assert report.verdict == "sound" and report.conventions.input_scales == 0


def test_tensors_that_the_index_leaves_out(make: Callable[..., Path]) -> None:
    folder = make(shard_bytes=100_000)
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].pop("model.norm.weight"))
    report = consistent(examine(folder))
    assert report.unindexed == ("model.norm.weight",) and report.missing == ("norm.weight",)
    said(report.reasons, "index leaves out norm.weight", "shards hold")
    said(report.remarks, "index leaves out", "(1)", "model.norm.weight")


def test_truncated_shard_is_an_error(make: Callable[..., Path]) -> None:
    folder = make(shard_bytes=100_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        examine(folder)


def test_an_unsupported_algorithm_is_reported_and_the_rest_examined(make: Callable[..., Path]) -> None:
    folder = make()
    edit_json(folder / "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="NVFP4_AWQ"))
    report = consistent(examine(folder))
    said(report.reasons, "quant_algo", "NVFP4_AWQ")
    assert report.block_scales and report.declared[0].algorithm == "NVFP4_AWQ"


@pytest.mark.parametrize("change", [{"model_type": "unheard_of"}, {"num_hidden_layers": 10**9}, {"text_config": [1]}])
def test_a_config_without_a_layout(change: dict[str, Any], make: Callable[..., Path]) -> None:
    folder = make()
    edit_json(folder / "config.json", lambda content: content.update(change))
    if "text_config" in change:  # not read in this architecture
        assert not examine(folder).broken
    else:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            examine(folder)


def test_configs_that_disagree(make: Callable[..., Path]) -> None:
    folder = make("nvidia/Gemma-4-26B-A4B-NVFP4")

    def change(content: dict[str, Any]) -> None:
        content["quantization_config"].update(kv_cache_scheme=None, quant_algo="MIXED_PRECISION")

    edit_json(folder / "config.json", change)
    report = consistent(examine(folder))
    said(report.remarks, "disagree on kv cache", "hf_quant_config.json: FP8", "config.json: none")
    said(report.remarks, "disagree on algorithm", "MIXED_PRECISION")


def test_no_codes_and_no_dense_weights_are_read(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(MIXED, shard_bytes=200_000)
    with Checkpoint.open(folder) as checkpoint:
        scales = {
            (checkpoint.files[info.file].path.name, info.start): info.nbytes
            for name, info in checkpoint.tensors.items()
            if name.rpartition(".")[2] not in ("weight", "bias") and "scale" in name.rpartition(".")[2]
        }
    reads: list[tuple[str, int, int]] = []
    read_into = SafetensorsFile.read_into

    def recorded(self: SafetensorsFile, start: int, buffers: Sequence[memoryview]) -> None:
        reads.append((self.path.name, start, sum(buffer.nbytes for buffer in buffers)))
        read_into(self, start, buffers)

    def unmapped(self: SafetensorsFile, info: Any) -> torch.Tensor:
        pytest.fail(f"{info.name} was mapped")

    monkeypatch.setattr(SafetensorsFile, "read_into", recorded)
    monkeypatch.setattr(SafetensorsFile, "tensor", unmapped)
    report = examine(folder)
    data = [(file, start, size) for file, start, size in reads if start != 8]  # 8: the header
    assert len(data) >= report.conventions.nvfp4_weights * 2
    assert all(scales.get((file, start)) == size for file, start, size in data)


def test_memory_is_that_of_the_plan(make: Callable[..., Path]) -> None:
    folder = make(MIXED)
    report = examine(folder)
    with Checkpoint.open(folder) as checkpoint:
        found = survey_checkpoint(checkpoint)
        for row in report.memory.rows:
            placement = Placement.even(found.experts, report.experts.per_layer, row.gpus)
            settings = CacheSettings(
                slots=report.memory.sequences, max_seq_len=report.memory.tokens, chunk=64, dtype=torch.bfloat16
            )
            plan = plan_memory(
                found, placement, 0, device=torch.device("cpu"), workspace=0, snapshots=0,
                cache=model_config(checkpoint.config).cache_spec, settings=settings,
            )  # fmt: skip
            assert (row.experts, row.dense) == (plan.experts, plan.dense)
            assert row.cache <= plan.cache  # which rounds up to pages and has a spare slot
            assert row.total == row.experts + row.dense + row.cache
    assert [row.gpus for row in report.memory.rows] == [1, 2, 4, 8]
    cache = layout(published(MIXED).scaled(tiny=True).config).cache
    assert report.memory.bytes_per_sequence == cache.state_bytes


def test_random_scales_never_stop_the_examination(make: Callable[..., Path]) -> None:
    for name in (MIXED, COMPRESSED):
        folder = make(name)
        random = np.random.default_rng(0)
        with Checkpoint.open(folder) as checkpoint:
            scales = [info for info in checkpoint.tensors.values() if info.name.rpartition(".")[2] != "weight"]
        patch(folder, {info.name: random.bytes(info.nbytes) for info in scales if "scale" in info.name})
        report = consistent(examine(folder, readers=3))
        assert report.broken and report.parts


def test_block_scale_stats_of_every_byte() -> None:
    every = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    for scales, decoded in [(every, values), (every[:128], values[:128]), (every[8:127], values[8:127])]:
        stats = block_scale_stats(scales)
        magnitude = np.abs(decoded)
        assert stats.total == scales.size and stats.nan == np.isnan(decoded).sum()
        assert stats.negative == (decoded < 0).sum() and stats.zero == (decoded == 0).sum()
        assert stats.subnormal == ((magnitude > 0) & (magnitude < 2.0**-6)).sum()
    assert block_scale_stats(every[:0]).total == 0


def test_the_multiplier_of_a_stored_global_scale() -> None:
    assert as_multiplier(0.5, False) == 0.5 and as_multiplier(0.0, False) == 0.0
    assert as_multiplier(3.0, True) == float(np.float32(1) / np.float32(3))
    for stored_value in (math.nan, math.inf, -math.inf, -1.0):
        assert as_multiplier(stored_value, False) is None and as_multiplier(stored_value, True) is None
    assert as_multiplier(0.0, True) is None and as_multiplier(2.0**-128, True) is None
    after = float(np.nextafter(np.float32(2.0**-128), np.float32(1)))
    assert math.isfinite(as_multiplier(after, True) or math.inf)
