"""Heads: the twin against transformers and float64, the kernel against float64, and stored bits against the format."""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.heads import _PROGRAMS, cos_sin, encode_e4m3_tl, norm_rope_store
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, decode_e4m3, encode_e4m3, relative_error
from moe_nvfp4.kernels.paged_kv import PagedKV, gather_twin
from moe_nvfp4.kernels.rows import Rows

LONGEST = 262144
MODELS = ("qwen3_moe", "qwen3_5_moe", "gemma4 sliding", "gemma4 global")


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dim: int
    half: int  # pairs that turn
    gated: bool = False  # the q heads lie 2 D apart
    shared: bool = False  # v is k before norm and rotation
    norms: str = "qk"  # of q, k, v
    offset: bool = False
    page: int = 16


QWEN35 = Case(16, 2, 256, 32, gated=True, offset=True)
QWEN3 = Case(32, 4, 128, 64)
SLIDING = Case(16, 8, 256, 128, norms="qkv")
GLOBAL = Case(16, 2, 512, 256, norms="qkv", shared=True)
SMALL = [
    Case(4, 2, 32, 4, gated=True, offset=True),
    Case(3, 1, 24, 12, norms="qkv", page=4),
    Case(5, 3, 20, 3, norms="q"),
    Case(2, 2, 8, 4, shared=True, norms="k"),
    Case(6, 2, 64, 32, shared=True, norms="qkv", page=1),
    Case(1, 1, 16, 8, norms="v"),
]
LARGE = [QWEN35, QWEN3, SLIDING, GLOBAL]
FEW = [(2, 40, 1), (0, 7, 1), (3, 0, 9)]  # slot, tokens before, rows
MANY = [(3, LONGEST - 1, 1), (1, 0, 600), (0, 100_000, 5)]


def projection(case: Case, rows: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """q, k and v as views of one matrix."""
    q_width = case.heads * case.dim * (1 + case.gated)
    kv_width = case.kv_heads * case.dim
    joined = torch.randn(rows, q_width + kv_width * (2 - case.shared)).to(dtype).to(device)
    q = joined[:, :q_width].view(rows, case.heads, -1)[..., : case.dim]
    k, v = (joined[:, end - kv_width : end].view(rows, -1, case.dim) for end in (q_width + kv_width, joined.shape[1]))
    return q, k, v


def pages(case: Case, pieces: list[tuple[int, int, int]], dtype: torch.dtype, device: str) -> PagedKV:
    """Slots use disjoint pages in random order, each as a ring long enough for the rows of a piece and some before."""
    slots = 1 + max(slot for slot, _, _ in pieces)
    ring = 2 + max(count for _, _, count in pieces) // case.page + 1
    longest = max(before + count for _, before, count in pieces)
    owned = torch.randperm(slots * ring).view(slots, ring)
    table = owned.repeat(1, -(-longest // (case.page * ring)))
    table = torch.nn.functional.pad(table, (0, 3), value=slots * ring)[:, :-1].int()  # a stride that is no width
    memory = [torch.empty(slots * ring + 1, case.page, case.kv_heads, case.dim, dtype=dtype) for _ in range(2)]
    keys, values = (part.to(device) for part in memory)
    return PagedKV(keys, values, table.to(device), *((0.5, 0.375) if dtype == torch.uint8 else ()))


def weights(case: Case, dtype: torch.dtype, device: str) -> list[torch.Tensor | None]:
    made = [(torch.randn(case.dim) * 0.2 + (not case.offset)).to(dtype).to(device) for _ in range(2)]
    return [weight if name in case.norms else None for name, weight in zip("qk", made, strict=True)]


def expected(case: Case, x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor, weight: Any, part: str) -> Any:
    """By complex numbers in float64, from the angle in float32."""
    x = x.double()
    if part in case.norms:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x if weight is None else x * (weight.double() + case.offset)
    if part == "v":
        return x
    angles = (positions.float()[:, None] * freq).double()
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    half = case.half
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turns
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def check(
    case: Case, pieces: list[tuple[int, int, int]], dtype: torch.dtype, device: str, page_dtype: torch.dtype
) -> None:
    rows = Rows.of(pieces, device)
    q, k, v = projection(case, len(rows.positions), dtype, device)
    kv = pages(case, pieces, page_dtype, device)
    before = [part.clone() for part in (kv.keys, kv.values)]
    freq = (10_000.0 ** (-torch.arange(case.half) / case.half)).to(device)
    q_norm, k_norm = weights(case, dtype, device)
    found = norm_rope_store(
        q, k, v, kv, rows, freq, 1e-5, q_norm, k_norm, offset=case.offset, norm_v="v" in case.norms
    )  # fmt: skip

    def wanted(x: torch.Tensor, weight: torch.Tensor | None, part: str) -> torch.Tensor:
        return expected(case, x, rows.positions, freq, weight, part)  # type: ignore[no-any-return]

    name = str(dtype).split(".")[1]
    assert (found.shape, found.dtype, found.is_contiguous()) == (q.shape, dtype, True)
    assert relative_error(found, wanted(q, q_norm, "q")) < TOLERANCE[name]
    exact = (wanted(k, k_norm, "k"), wanted(v, None, "v"))
    places = torch.zeros(kv.keys.shape[:2], dtype=torch.bool, device=device)
    first = 0
    for slot, start, count in pieces:
        stored = gather_twin(kv, slot, start, start + count, torch.float32)
        positions = torch.arange(start, start + count, device=device)
        places[kv.table[slot, positions // kv.page].long(), positions % kv.page] = True
        for actual, whole, scale in zip(stored, exact, (kv.k_scale, kv.v_scale), strict=True):
            rows_wanted = whole[first : first + count]
            assert relative_error(actual, rows_wanted) < TOLERANCE["fp8" if kv.is_fp8 else name]
            if kv.is_fp8:
                nearest = decode_e4m3(encode_e4m3((rows_wanted / scale).float())) * scale
                assert (actual != nearest).double().mean() < 2e-3  # a rounding of float32 may cross a midpoint
        first += count
    for after, untouched in zip((kv.keys, kv.values), before, strict=True):
        assert torch.equal(after[~places].view(torch.uint8), untouched[~places].view(torch.uint8))


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("case", [*SMALL, QWEN35, GLOBAL])
def test_twin(case: Case, page_dtype: torch.dtype) -> None:
    check(case, FEW, torch.bfloat16 if page_dtype == torch.bfloat16 else torch.float32, "cpu", page_dtype)


def reference_layers(model: str) -> tuple[Any, Any, Any, torch.Tensor]:
    """A norm's class, the function that rotates, cos and sin of positions, and the frequencies."""
    kind = model.split()[0]
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    name = {"qwen3_moe": "Qwen3Moe", "qwen3_5_moe": "Qwen3_5Moe", "gemma4": "Gemma4"}[kind]
    text = "" if kind == "qwen3_moe" else "Text"
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 32}
    if kind == "gemma4":
        sizes |= {"global_head_dim": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(module, f"{name}{text}Config")(**sizes)
    rotary = getattr(module, f"{name}{text}RotaryEmbedding")(config)
    layer = {"gemma4 sliding": "sliding_attention", "gemma4 global": "full_attention"}.get(model)
    freq = rotary.inv_freq if layer is None else getattr(rotary, f"{layer}_inv_freq")
    angles = (lambda x, p: rotary(x, p)) if layer is None else (lambda x, p: rotary(x, p, layer))
    return getattr(module, f"{name}RMSNorm"), module.apply_rotary_pos_emb, angles, freq


@pytest.mark.parametrize("model", MODELS)
def test_twin_is_transformers(model: str) -> None:
    norm_class, rotate, angles, freq = reference_layers(model)
    dim = 64 if model == "gemma4 global" else 32
    assert 2 * freq.numel() == (8 if model == "qwen3_5_moe" else dim)
    positions = [0, 1, 7, 1023, 65_535, LONGEST - 1]
    rows = Rows.of([(slot, position, 1) for slot, position in enumerate(positions)])
    q, k, v = torch.randn(6, 4, dim), torch.randn(6, 2, dim), torch.randn(6, 2, dim)
    norms = [norm_class(dim, eps=1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.randn(dim)
    gemma = model.startswith("gemma4")
    table = torch.arange(6, dtype=torch.int32)[:, None].repeat(1, LONGEST // 64)
    kv = PagedKV(torch.empty(6, 64, 2, dim), torch.empty(6, 64, 2, dim), table)
    found = norm_rope_store(
        q, k, v, kv, rows, freq, 1e-6, norms[0].weight.data, norms[1].weight.data,
        offset=model == "qwen3_5_moe", norm_v=gemma,
    )  # fmt: skip
    cos, sin = angles(q, torch.tensor([positions]))
    normed = [norm(x[None]).transpose(1, 2) for norm, x in zip(norms, (q, k), strict=True)]
    if gemma:
        expected_q, expected_k = (rotate(x, cos, sin, unsqueeze_dim=1) for x in normed)
        v = norm_class(dim, eps=1e-6, with_scale=False)(v)
    else:
        expected_q, expected_k = rotate(*normed, cos, sin)
    torch.testing.assert_close(found, expected_q[0].transpose(0, 1).detach(), rtol=1e-5, atol=2e-6)
    for slot, position in enumerate(positions):
        stored_k, stored_v = gather_twin(kv, slot, position, position + 1, torch.float32)
        torch.testing.assert_close(stored_k[0], expected_k[0, :, slot].detach(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(stored_v[0], v[slot], rtol=1e-5, atol=2e-6)


@triton.jit
def encode_all(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, encode_e4m3_tl(tl.load(x_ptr + i, mask=i < size)), mask=i < size)


@triton.jit
def turn_all(x_ptr, cos_ptr, sin_ptr, size, BLOCK: tl.constexpr, FUSED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cos, sin = cos_sin(tl.load(x_ptr + i, mask=i < size), FUSED)
    tl.store(cos_ptr + i, cos, mask=i < size)
    tl.store(sin_ptr + i, sin, mask=i < size)


def check_encoding(device: str) -> None:
    """Every value, every midpoint and their neighbours, of both signs, and what lies beyond."""
    values = decode_e4m3(torch.arange(127, dtype=torch.uint8))
    points = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.tensor([460.0, 464.0, 1e30, torch.inf])))
    points = torch.cat((points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(0.0))))
    points = torch.cat((points, -points, torch.randn(2000), torch.randn(2000) * 0.01)).to(device)
    found = torch.empty_like(points, dtype=torch.uint8)
    encode_all[(triton.cdiv(len(points), 1024),)](points, found, len(points), BLOCK=1024)
    assert torch.equal(found, encode_e4m3(points))
    nan = torch.full((2,), torch.nan, device=device)
    encode_all[(1,)](nan, found, 2, BLOCK=1024)
    assert decode_e4m3(found[:2]).isnan().all()


def check_turns(device: str) -> None:
    angles = torch.cat((torch.rand(20_000) * LONGEST, torch.rand(10_000) * 10, torch.arange(5000) * (torch.pi / 4)))
    angles = torch.cat((angles, torch.tensor([0.0, LONGEST - 1.0, 1e-20]))).to(device)
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    turn_all[(triton.cdiv(len(angles), 1024),)](angles, cos, sin, len(angles), BLOCK=1024, FUSED=device == "cuda")
    assert (cos - angles.double().cos()).abs().max() < 1.5e-7
    assert (sin - angles.double().sin()).abs().max() < 1.5e-7
    assert (cos[-3], sin[-3]) == (1, 0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_parts() -> None:
    check_encoding("cpu")
    check_turns("cpu")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("case", "page_dtype"),
    [
        *((case, dtype) for case in SMALL for dtype in (torch.bfloat16, torch.uint8)),
        (QWEN35, torch.uint8),
        (GLOBAL, torch.uint8),
    ],
)
def test_interpreted(case: Case, page_dtype: torch.dtype) -> None:
    check(case, FEW, torch.bfloat16, "cpu", page_dtype)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", SMALL)
def test_interpreted_several_heads_a_program(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_nvfp4.kernels.heads._PROGRAMS", 4)
    check(case, [(2, LONGEST - 1, 1), (0, 3, 5)], torch.bfloat16, "cpu", torch.bfloat16)


@pytest.mark.gpu
def test_gpu_parts() -> None:
    check_encoding("cuda")
    check_turns("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("case", [*SMALL, *LARGE])
def test_gpu(case: Case, page_dtype: torch.dtype) -> None:
    check(case, FEW, torch.bfloat16, "cuda", page_dtype)
    assert 606 * case.heads > _PROGRAMS or case not in LARGE
    check(case, MANY, torch.bfloat16, "cuda", page_dtype)
