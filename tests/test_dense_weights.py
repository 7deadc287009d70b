"""Dense weights equal the checkpoint's, and loading takes no more memory than what it leaves behind."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CT_GEMMA4, CT_QWEN3, GEMMA4, MODELOPT_QWEN3, NEMOTRON, QWEN3_6, overwrite, write_sparse

from moe_nvfp4 import dense_weights
from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.dense_weights import DenseWeights, dense_bytes, load_dense
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, NVFP4Tensor
from moe_nvfp4.layouts import layout
from moe_nvfp4.layouts.base import TensorSpec
from moe_nvfp4.published import published
from moe_nvfp4.scales import block_scale_stats
from moe_nvfp4.survey import survey_checkpoint
from moe_nvfp4.synthesize import synthesize
from moe_nvfp4.weight_source import normalise

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KINDS = [MODELOPT_QWEN3, CT_QWEN3, QWEN3_6, GEMMA4, CT_GEMMA4, NEMOTRON]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        synthesize(name, tmp_path / "x", tiny=True, seed=4, progress=False)
        return tmp_path / "x"

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DenseWeights:
    with Checkpoint.open(folder) as checkpoint:
        return load_dense(checkpoint, survey_checkpoint(checkpoint), device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_weights_equal_the_checkpoint(made: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    folder = made(name)
    stored = {normalise(n): t for n, t in load_file(folder / "model.safetensors").items()}
    weights = load(folder, dtype)
    with Checkpoint.open(folder) as checkpoint:
        found = survey_checkpoint(checkpoint)
        expected = {normalise(n) for n in layout(checkpoint.config).parameters}
    assert weights.keys() == expected
    formats = {"NVFP4Tensor": 0, "FP8Tensor": 0, "Tensor": 0}
    for parameter, weight in weights.items():
        formats[type(weight).__name__] += 1
        module = parameter.removesuffix(".weight")
        assert weight.nbytes == dense_bytes(found.dense[parameter], dtype)
        if isinstance(weight, NVFP4Tensor):
            packed, divisor = stored.get(f"{module}.weight_packed"), stored.get(f"{module}.weight_global_scale")
            assert torch.equal(weight.codes, stored[parameter] if packed is None else packed)
            assert torch.equal(weight.block_scales, stored[f"{module}.weight_scale"].view(torch.uint8))
            wanted = stored[f"{module}.weight_scale_2"] if divisor is None else 1 / divisor.reshape(())
            assert torch.equal(weight.global_scale, wanted)
        elif isinstance(weight, FP8Tensor):
            assert torch.equal(weight.values, stored[parameter].view(torch.uint8))
            assert torch.equal(weight.scale, stored[f"{module}.weight_scale"])
        else:
            kept = torch.float32 if stored[parameter].dtype == torch.float32 else dtype
            assert weight.dtype == kept
            assert torch.equal(weight, stored[parameter].to(kept))
    assert (formats["FP8Tensor"] > 0) == (name == QWEN3_6)
    assert (formats["NVFP4Tensor"] > 0) == (name != GEMMA4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), "N", "N1"])
def test_fp8_scales_of_every_shape(made: Callable[[str], Path], shape: object, dtype: torch.dtype) -> None:
    folder = made(QWEN3_6)
    tensors = load_file(folder / "model.safetensors")
    name = next(
        n for n, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn and n.endswith("k_proj.weight")
    )
    rows = tensors[name].shape[0]
    real = {"N": (rows,), "N1": (rows, 1)}.get(shape, shape)  # type: ignore[call-overload]
    scale = (torch.rand(real) + 0.5).to(dtype)
    save_file(tensors | {f"{name}_scale": scale}, folder / "model.safetensors")
    weight = load(folder)[normalise(name)]
    assert isinstance(weight, FP8Tensor)
    assert torch.equal(weight.scale, scale.float().reshape(-1) if shape in ("N", "N1") else scale.float().reshape(()))
    wanted = tensors[name].float() * scale.float().reshape(-1, 1)
    assert torch.equal(weight.dequantize(), wanted)


def test_a_bias_beside_a_quantised_weight(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the module's name, and only one of them has scales."""
    folder = made(NEMOTRON)
    with Checkpoint.open(folder) as checkpoint:
        found = survey_checkpoint(checkpoint)
        name = next(n for n, source in found.dense.items() if source.format == "nvfp4")
        bias = next(n for n, source in found.dense.items() if n.endswith("norm.weight"))
        dense = dict(found.dense)
        dense["first"] = type(dense[bias])(dense[name].name, "plain", dense[bias].shape, dense[bias].weight)
        object.__setattr__(found, "dense", dense)
        weights = load_dense(checkpoint, found, device="cpu", dtype=torch.float32)
    assert isinstance(weights[name], NVFP4Tensor)
    assert torch.equal(weights["first"], weights[bias])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "leaf", "data"),
    [
        (QWEN3_6, "q_proj.weight_scale", struct.pack("<f", float("nan"))),
        (QWEN3_6, "q_proj.weight_scale", struct.pack("<f", float("inf"))),
        (QWEN3_6, "q_proj.weight_scale", struct.pack("<f", -1.0)),
        (QWEN3_6, "shared_expert.up_proj.weight_scale", b"\x7f"),
        (QWEN3_6, "shared_expert.up_proj.weight_scale_2", struct.pack("<f", float("nan"))),
        (CT_QWEN3, "q_proj.weight_scale", b"\xff"),
        (CT_QWEN3, "q_proj.weight_scale", b"\x90"),
        (CT_QWEN3, "q_proj.weight_global_scale", struct.pack("<f", 0.0)),
    ],
)
def test_broken_scales_take_no_memory(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, leaf: str, data: bytes
) -> None:
    folder = made(name)
    stored = next(n for n in load_file(folder / "model.safetensors") if n.endswith(leaf) and not n.startswith("mtp"))
    overwrite(folder, stored, data)
    monkeypatch.setattr(dense_weights, "_allocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match=stored):
        load(folder)


def test_block_scale_counts() -> None:
    scales = torch.tensor([0x00, 0x80, 0x01, 0x87, 0x08, 0x7E, 0x7F, 0xFF, 0xFE], dtype=torch.uint8).numpy()
    total, nan, negative, zero, subnormal = block_scale_stats(scales)
    assert (total, nan, negative, zero, subnormal) == (9, 2, 2, 2, 2)  # 0x87 is negative and subnormal
    assert block_scale_stats(scales[4:6]) == (2, 0, 0, 0, 0)
    assert block_scale_stats(scales[:0]).total == 0


PEAK = """
import sys, torch
from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.dense_weights import load_dense
from moe_nvfp4.expert_buffers import ExpertBuffers
from moe_nvfp4.safetensors_file import TORCH_DTYPES
from moe_nvfp4.survey import survey_checkpoint

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

folder, how, dtype = sys.argv[1:]
# The code and threads of torch's operators, about 40 MB, are there once and not part of a load.
warm = torch.zeros(1 << 20, dtype=torch.uint8)
torch.stack([((warm == 0x7F) | (warm > 0x80)).any()]).tolist()
torch.ones(1 << 20).bfloat16().float().sum()
with Checkpoint.open(folder) as checkpoint:
    found = survey_checkpoint(checkpoint)
    before, final = status("VmRSS"), 0
    if how == "from_experts":
        originals = {}
        for projections in found.experts.values():
            for source in (s for sources in projections.values() for s in sources):
                for info in source.tensors:
                    flat = torch.frombuffer(checkpoint.read(info), dtype=TORCH_DTYPES[info.dtype])
                    originals[info.name] = flat.view(info.shape)
        source = projections = flat = None
        experts = ExpertBuffers.from_experts(originals, found.layout)
    else:
        experts = ExpertBuffers.load(checkpoint, found, device="cpu")
        weights = load_dense(checkpoint, found, device="cpu", dtype=getattr(torch, dtype))
        final = sum(weight.nbytes for weight in weights.values())
print(final + experts.nbytes, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of Qwen3-30B with a fifth of its vocabulary, as holes of a file: 340 MB of experts."""
    folder = tmp_path_factory.mktemp("large") / "x"
    source = published(MODELOPT_QWEN3).scaled(layers=1)
    specs, config = source.manifest(), dict(source.config) | {"vocab_size": 30_000}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        specs[name] = TensorSpec("BF16", (30_000, specs[name].shape[1]))
    write_sparse(folder, specs, config, tensors_per_shard=1000)
    return folder


@pytest.mark.parametrize(("how", "dtype"), [("load", "bfloat16"), ("load", "float32"), ("from_experts", "float32")])
def test_peak_memory(large: Path, how: str, dtype: str) -> None:
    """At most 5 % and 8 MB above the final size; the 8 MB are names and Python objects of 1,600 tensors."""
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(large), how, dtype],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    final, peak = map(int, result.stdout.split())
    assert final > 300e6
    print(f"{how} {dtype}: peak {peak / final:.3f} of {final / 1e6:.0f} MB")
    assert peak <= 1.05 * final + 8e6, f"{peak / 1e6:.0f} MB for {final / 1e6:.0f} MB"
    assert peak > 0.95 * final  # or nothing was measured
