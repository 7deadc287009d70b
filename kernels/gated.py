"""Elementwise ends of MLPs: the gated activation of gate | up, and a shared expert's gated share.

A warp takes 256 columns of a row, 16 bytes of each tensor to a lane. Of many rows a program takes four.

Letters: T rows, I intermediate, H hidden.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import KINDS, UNGATED, activate, activate_tl
from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sizes import cdiv
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

_COLUMNS: Final = 256
_MANY_ROWS: Final = 16  # from here on programs of _ROWS rows: at 4096 rows those of one row take 3.5 times as long
_ROWS: Final = 4


def gated(gate_up_T2I: Tensor, activation: str) -> Tensor:
    """act(gate) * up of gate | up side by side: [T, 2 I] -> [T, I]. Rows may lie apart; `activation` is a gated one
    of activation.KINDS."""
    assert activation in KINDS and activation not in UNGATED, activation
    if use_twin(gate_up_T2I) or gate_up_T2I.dtype != torch.bfloat16:
        return gated_twin(gate_up_T2I, activation)
    assert gate_up_T2I.stride(1) == 1, gate_up_T2I.stride()
    num_rows, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    out_TI = gate_up_T2I.new_empty(num_rows, width)
    grid, options = _tiles(num_rows, width)
    activate_rows[grid](
        gate_up_T2I, out_TI, num_rows, width, gate_up_T2I.stride(0), KIND=activation,
        **options, **launch_options(gate_up_T2I),
    )  # fmt: skip
    return out_TI


def gated_twin(gate_up_T2I: Tensor, activation: str) -> Tensor:
    gate, up = _wide(gate_up_T2I).chunk(2, dim=-1)
    return activate(activation, gate, up).to(gate_up_T2I.dtype)


def add_gated_share(y_TH: Tensor, shared_TH: Tensor, gate_T1: Tensor) -> Tensor:
    """y + sigmoid(gate) * shared, as a new tensor. Rows of each may lie apart."""
    if use_twin(y_TH) or y_TH.dtype != torch.bfloat16:
        return add_gated_share_twin(y_TH, shared_TH, gate_T1)
    assert y_TH.stride(1) == 1 and shared_TH.stride(1) == 1, (y_TH.stride(), shared_TH.stride())
    num_rows, hidden = y_TH.shape
    out_TH = y_TH.new_empty(num_rows, hidden)
    grid, options = _tiles(num_rows, hidden)
    add_share_rows[grid](
        y_TH, shared_TH, gate_T1, out_TH, num_rows, hidden, y_TH.stride(0), shared_TH.stride(0), gate_T1.stride(0),
        **options, **launch_options(y_TH),
    )  # fmt: skip
    return out_TH


def add_gated_share_twin(y_TH: Tensor, shared_TH: Tensor, gate_T1: Tensor) -> Tensor:
    return (_wide(y_TH) + _wide(gate_T1).sigmoid() * _wide(shared_TH)).to(y_TH.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tiles(num_rows: int, width: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Rows are the grid's first axis, which may have 2^31 programs."""
    rows, warps = (_ROWS, _ROWS) if num_rows >= _MANY_ROWS else (1, 1)
    grid = cdiv(num_rows, rows), cdiv(width, _COLUMNS)
    return grid, {"BT": rows, "BI": _COLUMNS, "num_warps": warps}


@triton.jit
def activate_rows(
    x_ptr, out_ptr, T, width, x_stride,
    KIND: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    i = (tl.program_id(1) * BI + tl.arange(0, BI))[None, :]
    live = (t < T) & (i < width)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(x_ptr + t * x_stride + i, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * x_stride + width + i, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * width + i, activate_tl(gate, up, KIND).to(tl.bfloat16), mask=live)


@triton.jit
def add_share_rows(
    y_ptr, shared_ptr, gate_ptr, out_ptr, T, width, y_stride, shared_stride, gate_stride,
    BT: tl.constexpr, BI: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    i = (tl.program_id(1) * BI + tl.arange(0, BI))[None, :]
    live = (t < T) & (i < width)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_ptr + t * gate_stride, mask=t < T, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + t * y_stride + i, mask=live, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + t * shared_stride + i, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * width + i, (y + shared / (1 + tl.exp(-gate))).to(tl.bfloat16), mask=live)


def compile_cases() -> list[CompileCase]:
    sizes = {"T": "i32", "width": "i32"}
    acts = {"x_ptr": "*bf16", "out_ptr": "*bf16", "x_stride": "i32"} | sizes
    shares = dict.fromkeys(("y_ptr", "shared_ptr", "gate_ptr", "out_ptr"), "*bf16") | sizes
    shares |= dict.fromkeys(("y_stride", "shared_stride", "gate_stride"), "i32")
    cases = []
    for num_rows in (1, _MANY_ROWS):
        tile = _tiles(num_rows, 2048)[1]
        warps = {"num_warps": tile.pop("num_warps")}
        for kind in ("silu", "gelu_tanh"):
            cases += pdl_cases(f"activate_rows {kind} {num_rows}", activate_rows, acts, warps, KIND=kind, **tile)
        cases += pdl_cases(f"add_share_rows {num_rows}", add_share_rows, shares, warps, **tile)
    return cases
