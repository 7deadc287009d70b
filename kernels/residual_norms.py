"""Branches into the residual stream, and the norms that follow, in one launch: a program for each row.

    s = sum of branches, each normed or not;  s = norm(s) or s;  x' = (x + s) * scalar;  x' and norm_1(x') to norm_3(x')

A row stays in registers from its first read to its last write. Norms are taken of x' in float32, before it is rounded.
On sm_90 and later the weights are loaded while the predecessor still runs.

Letters: T rows, H hidden.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sizes import next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

MAX_BRANCHES: Final = 2
MAX_OUTPUTS: Final = 3


class Norm(NamedTuple):
    """x / rms(x) * weight, or * (1 + weight) with `offset`, or alone."""

    weight: Tensor | None  # [H], of any float dtype
    eps: float
    offset: bool = False


Branch = tuple[Tensor, Norm | None]


def residual_norms(
    x_TH: Tensor,
    branches: Sequence[Branch],
    outputs: Sequence[Norm],
    *,
    after: Norm | None = None,
    scalar: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """x' and its norms, as above. Up to two branches and three outputs; `scalar` has one element. With no branch and
    no scalar x' is x itself."""
    assert len(branches) <= MAX_BRANCHES and len(outputs) <= MAX_OUTPUTS, (len(branches), len(outputs))
    assert after is None or branches, "`after` norms the sum of branches, and there are none"
    if use_twin(x_TH) or x_TH.dtype != torch.bfloat16:
        return residual_norms_twin(x_TH, branches, outputs, after=after, scalar=scalar)
    num_rows, hidden = x_TH.shape
    x_TH, ys = x_TH.contiguous(), [y.contiguous() for y, _ in branches]
    changes = bool(branches) or scalar is not None
    out_TH = x_TH.new_empty(num_rows, hidden) if changes else x_TH
    normed = [x_TH.new_empty(num_rows, hidden) for _ in outputs]
    norms = [*_padded([norm for _, norm in branches], MAX_BRANCHES), after, *_padded(outputs, MAX_OUTPUTS)]
    if changes or outputs:
        add_and_norm[(num_rows,)](
            x_TH, *(ys + [x_TH] * 2)[:MAX_BRANCHES],
            *(x_TH if norm is None or norm.weight is None else norm.weight for norm in norms),
            x_TH if scalar is None else scalar, out_TH, *(normed + [x_TH] * MAX_OUTPUTS)[:MAX_OUTPUTS],
            H=hidden, BH=next_power_of_2(hidden), BRANCHES=len(branches), OUTPUTS=len(outputs),
            KINDS=tuple(map(_kind, norms)), EPS=tuple(0.0 if norm is None else norm.eps for norm in norms),
            SCALAR=scalar is not None, CHANGES=changes,
            num_warps=num_warps(hidden), **launch_options(x_TH),
        )  # fmt: skip
    return out_TH, normed


def residual_norms_twin(
    x_TH: Tensor,
    branches: Sequence[Branch],
    outputs: Sequence[Norm],
    *,
    after: Norm | None = None,
    scalar: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    x = _wide(x_TH)
    if branches:
        ys = [_wide(y) if norm is None else norm_twin(_wide(y), norm) for y, norm in branches]
        s = sum(ys[1:], start=ys[0])
        x = x + (s if after is None else norm_twin(s, after))
    if scalar is not None:
        x = x * _wide(scalar)
    changed = x.to(x_TH.dtype) if branches or scalar is not None else x_TH
    return changed, [norm_twin(x, norm).to(x_TH.dtype) for norm in outputs]


def norm_twin(x: Tensor, norm: Norm) -> Tensor:
    """In the dtype of x, which is float32 or wider."""
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is None:
        return scaled
    weight = norm.weight.to(x.dtype)
    return scaled * (1 + weight if norm.offset else weight)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _padded(norms: Sequence[Norm | None], size: int) -> list[Norm | None]:
    return [*norms, *[None] * (size - len(norms))]


def _kind(norm: Norm | None) -> int:
    """0 no norm, 1 without weight, 2 weight, 3 one plus weight."""
    if norm is None or norm.weight is None:
        return int(norm is not None)
    return 3 if norm.offset else 2


def num_warps(hidden: int) -> int:
    """Few, also for one row, whose barriers cost more than its arithmetic: 4, or 8 beyond 4096 columns."""
    columns: int = next_power_of_2(hidden)
    return max(1, min(4, columns // 64), columns // 1024)


@triton.jit
def add_and_norm(
    x_ptr, y0_ptr, y1_ptr, w_y0_ptr, w_y1_ptr, w_after_ptr, w0_ptr, w1_ptr, w2_ptr, scalar_ptr,
    x_out_ptr, out0_ptr, out1_ptr, out2_ptr, H: tl.constexpr, BH: tl.constexpr,
    BRANCHES: tl.constexpr, OUTPUTS: tl.constexpr, KINDS: tl.constexpr, EPS: tl.constexpr,
    SCALAR: tl.constexpr, CHANGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BH)
    at = tl.program_id(0).to(tl.int64) * H + h
    w_y0, w_y1 = _weight(w_y0_ptr, h, H, KINDS[0]), _weight(w_y1_ptr, h, H, KINDS[1])
    w_after = _weight(w_after_ptr, h, H, KINDS[2])
    w0, w1, w2 = _weight(w0_ptr, h, H, KINDS[3]), _weight(w1_ptr, h, H, KINDS[4]), _weight(w2_ptr, h, H, KINDS[5])
    if SCALAR:
        scalar = tl.load(scalar_ptr).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + at, mask=h < H, other=0.0).to(tl.float32)
    if BRANCHES == 1:
        y0 = tl.load(y0_ptr + at, mask=h < H, other=0.0).to(tl.float32)
        s = _normed(y0, tl.sum(y0 * y0), w_y0, H, KINDS[0], EPS[0])
    elif BRANCHES == 2:
        y0 = tl.load(y0_ptr + at, mask=h < H, other=0.0).to(tl.float32)
        y1 = tl.load(y1_ptr + at, mask=h < H, other=0.0).to(tl.float32)
        total0, total1 = tl.reduce((y0 * y0, y1 * y1), 0, _add_pairs)
        s = _normed(y0, total0, w_y0, H, KINDS[0], EPS[0]) + _normed(y1, total1, w_y1, H, KINDS[1], EPS[1])
    if BRANCHES > 0:
        x += _normed(s, tl.sum(s * s), w_after, H, KINDS[2], EPS[2])
    if SCALAR:
        x *= scalar
    if CHANGES:
        tl.store(x_out_ptr + at, x.to(tl.bfloat16), mask=h < H)
    total = tl.sum(x * x)
    if OUTPUTS > 0:
        tl.store(out0_ptr + at, _normed(x, total, w0, H, KINDS[3], EPS[3]).to(tl.bfloat16), mask=h < H)
    if OUTPUTS > 1:
        tl.store(out1_ptr + at, _normed(x, total, w1, H, KINDS[4], EPS[4]).to(tl.bfloat16), mask=h < H)
    if OUTPUTS > 2:
        tl.store(out2_ptr + at, _normed(x, total, w2, H, KINDS[5], EPS[5]).to(tl.bfloat16), mask=h < H)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _weight(ptr, h, H: tl.constexpr, KIND: tl.constexpr):
    """As it lies in memory, so that it takes few registers; 0 where there is none."""
    if KIND >= 2:
        return tl.load(ptr + h, mask=h < H, other=0.0)
    else:
        return 0.0


@triton.jit
def _normed(x, total, w, H: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr):
    """`total` is the sum of squares of x; a sum that no norm uses is never computed."""
    if KIND == 0:
        return x
    else:
        scaled = x * tl.rsqrt(total / H + EPS)
        if KIND == 1:
            return scaled
        elif KIND == 2:
            return scaled * w.to(tl.float32)
        else:
            return scaled * (1 + w.to(tl.float32))


def compile_cases() -> list[CompileCase]:
    pointers = ["x_ptr", "y0_ptr", "y1_ptr", "w_y0_ptr", "w_y1_ptr", "w_after_ptr", "w0_ptr", "w1_ptr", "w2_ptr"]
    pointers += ["scalar_ptr", "x_out_ptr", "out0_ptr", "out1_ptr", "out2_ptr"]
    signature = dict.fromkeys(pointers, "*bf16")
    shapes: dict[str, tuple[int, int, tuple[int, ...], bool]] = {  # branches, outputs, kinds of norms, scalar
        "Qwen": (1, 1, (0, 0, 0, 3, 0, 0), False),
        "Gemma, three outputs": (1, 3, (2, 0, 0, 2, 2, 1), False),
        "Gemma, two branches": (2, 1, (2, 2, 2, 2, 0, 0), True),
        "first": (0, 1, (0, 0, 0, 2, 0, 0), False),
    }
    cases = []
    for name, (branches, outputs, kinds, scalar) in shapes.items():
        for hidden in (2048, 2816, 5376):
            constants: dict[str, Any] = {"H": hidden, "BH": triton.next_power_of_2(hidden), "KINDS": kinds}
            constants |= {"EPS": (1e-6,) * 6, "BRANCHES": branches, "OUTPUTS": outputs, "SCALAR": scalar}
            constants |= {"CHANGES": branches > 0}
            options = {"num_warps": num_warps(hidden)}
            cases += pdl_cases(f"{name} {hidden}", add_and_norm, signature, options, **constants)
    return cases
