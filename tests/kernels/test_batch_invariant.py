"""Kernels that are asked for it compute a row to the same bits whatever the other rows and their number.

The tests on a GPU compute rows among others and alone, and say where the first bit differs. What a step takes besides
is here too, though nobody has to ask it: norms, activations, delta nets, attention of prompts, sampling.
"""

from collections.abc import Callable, Sequence
from typing import Any

import delta_cases
import pytest
import torch
from expert_cases import Case, make
from paged_cases import LARGE, Shape, pages
from test_dense import KINDS, on, weight_of
from torch import Tensor

from moe_nvfp4.kernels.delta_net import DeltaInputs, delta_net
from moe_nvfp4.kernels.gated import add_gated_share, gated
from moe_nvfp4.kernels.grouped_rows import routed_experts_grouped
from moe_nvfp4.kernels.heads import norm_rope_store
from moe_nvfp4.kernels.linear import Invariant, Stacked, linear, stack
from moe_nvfp4.kernels.norm_linear import norm_linear
from moe_nvfp4.kernels.paged_attention import paged_attention
from moe_nvfp4.kernels.residual_norms import Norm, residual_norms
from moe_nvfp4.kernels.route import route
from moe_nvfp4.kernels.routed_experts import routed_experts
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sample import SamplingRows, logprobs, sample
from moe_nvfp4.kernels.sort_pairs import sort_pairs

ROWS = 700
# First row and number of rows: each range in which some kernel is chosen by the number.
PARTS = [(0, 1), (699, 1), (5, 2), (7, 3), (0, 8), (1, 9), (33, 16), (2, 17), (100, 64), (3, 65), (11, 200), (0, 600)]


def require_equal(alone: Tensor, among: Tensor, what: str) -> None:
    assert alone.shape == among.shape, f"{what}: {tuple(alone.shape)} alone, {tuple(among.shape)} among others"
    differ = (alone != among) & ~(alone.isnan() & among.isnan())
    if differ.any():
        place = tuple(differ.nonzero()[0].tolist())
        pytest.fail(
            f"{what}: first differing position {place}: {alone[place].item()!r} alone, {among[place].item()!r} among "
            f"others; {int(differ.sum())} of {differ.numel()} differ"
        )


def check_parts(run: Callable[[slice], Sequence[Tensor]], what: str) -> None:
    """`run` computes some of ROWS rows."""
    every = run(slice(0, ROWS))
    for first, count in PARTS:
        here = slice(first, first + count)
        for index, (part, whole) in enumerate(zip(run(here), every, strict=True)):
            require_equal(part, whole[here], f"{what}, output {index}, rows {first} to {first + count}")


def test_a_stack_of_weights_asks_for_what_its_parts_ask() -> None:
    plain, other = torch.randn(3, 8), torch.randn(2, 8)
    assert isinstance(stack([plain, other], fast=False), Stacked)
    assert stack([Invariant(plain)], fast=True) == Invariant(plain)
    for dtype in (torch.float32, torch.bfloat16):
        asked = stack([Invariant(plain.to(dtype)), Invariant(other.to(dtype))], fast=True)
        assert isinstance(asked, Invariant) and isinstance(asked.weight, Stacked) == (dtype == torch.float32)


def test_log_probabilities_row_by_row() -> None:
    logits, ids = torch.randn(3, 50), torch.tensor([1, 2, 3])
    for one, other in zip(logprobs(logits, ids, 2), logprobs(logits, ids, 2, batch_invariant=True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k"), [(512, 2048), (272, 2688), (48, 8192), (6400, 128), (9728, 128), (65536, 64), (96, 80)]
)
def test_linear(kind: str, n: int, k: int) -> None:
    weight = Invariant(on("cuda", weight_of(kind, n, k)[0]))
    x = torch.randn(ROWS, k, device="cuda").bfloat16()
    check_parts(lambda here: [linear(x[here], weight)], f"{kind} {n} x {k}")


@pytest.mark.gpu
def test_norms_and_projections_of_them() -> None:
    known = [weight_of(kind, n, 2048)[0] for kind, n in (("fp8", 272), ("bf16", 64))]
    weights = [Invariant(on("cuda", weight)) for weight in known]
    x, y = (torch.randn(ROWS, 2048, device="cuda").bfloat16() for _ in range(2))
    norm = Norm(torch.randn(2048, device="cuda").bfloat16(), 1e-6, offset=True)

    def run(here: slice) -> list[Tensor]:
        changed, outputs = norm_linear(x[here], y[here], norm, weights)
        return [changed, *outputs]

    check_parts(run, "norm_linear")


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [256, 2048, 2816, 5376])
def test_residuals_and_activations(hidden: int) -> None:
    x, y, z = (torch.randn(ROWS, hidden, device="cuda").bfloat16() for _ in range(3))
    norms = [Norm(torch.randn(hidden, device="cuda").bfloat16(), 1e-6) for _ in range(3)]

    def run(here: slice) -> list[Tensor]:
        branches = [(y[here], norms[0]), (z[here], None)]
        changed, normed = residual_norms(x[here], branches, norms[1:], after=norms[0])
        share = add_gated_share(x[here], y[here], z[here, :1])
        return [changed, *normed, gated(x[here], "silu"), gated(x[here], "gelu_tanh"), share]

    check_parts(run, f"{hidden} columns")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("experts", "hidden", "shared"), [(256, 2048, True), (128, 2816, False), (16, 256, False)])
def test_route(experts: int, hidden: int, shared: bool, dtype: torch.dtype) -> None:
    router = torch.randn(experts + shared, hidden, device="cuda").to(dtype) / hidden**0.5
    x = torch.randn(ROWS, hidden, device="cuda").bfloat16()
    check_parts(
        lambda here: route(x[here], router, 8, normalise=True, shared=shared, batch_invariant=True),
        f"{experts} experts, {dtype}",
    )


EXPERTS = [
    Case(16, 4, 256, 128, ROWS),
    Case(256, 8, 512, 256, ROWS),
    Case(64, 8, 2816, 704, ROWS, "gelu_tanh"),
    Case(12, 9, 512, 704, ROWS, routing="holes"),
    Case(8, 6, 2688, 1856, ROWS, "relu2", routing="one"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_routed_experts(case: Case) -> None:
    inputs = make(case, "cuda")
    weights = inputs.fragments()

    def run(here: slice) -> list[Tensor]:
        x, ids, shares = inputs.x[here], inputs.ids[here], inputs.weights[here]
        return [routed_experts(x, *weights, ids, shares, case.activation, batch_invariant=True)]

    check_parts(run, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_runs_of_eight_and_of_sixteen_sum_alike(case: Case) -> None:
    """The number of pairs chooses between them."""
    inputs = make(case, "cuda")
    weights, ids = inputs.fragments(), inputs.ids.int()
    short, long = (
        routed_experts_grouped(
            inputs.x, *weights, ids, inputs.weights, sort_pairs(ids, case.experts, run), case.activation
        )
        for run in (8, 16)
    )
    require_equal(short, long, f"runs of 8 (alone) and 16 (among others), {case}")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_heads(shape: Shape) -> None:
    heads, groups, dim, page, _ = shape
    qkv = torch.randn(ROWS, heads + 2 * groups, dim, device="cuda").bfloat16()
    freq, norm = torch.rand(dim // 4, device="cuda"), torch.randn(dim, device="cuda").bfloat16()
    positions = list(range(ROWS))

    def run(here: slice) -> list[Tensor]:
        kv = pages((page, groups, dim), 1, ROWS, torch.bfloat16, "cuda")._replace(batch_invariant=True)
        q, k, v = qkv[here].split((heads, groups, groups), dim=1)
        rows = Rows.of([(0, here.start, here.stop - here.start)], "cuda")
        out = norm_rope_store(q, k, v, kv, rows, freq, 1e-6, norm, norm, norm_v=True)
        at = torch.tensor(positions[here], device="cuda")
        place = kv.table[0, at // page].long(), at % page
        return [out, kv.keys[place], kv.values[place]]

    check_parts(run, f"heads {shape}")


Pieces = list[tuple[int, int, int]]
# (slot, tokens before, rows) of each sequence, those of one row first.
ATTENDED: Pieces = [(0, 0, 1), (1, 39, 1), (2, 300, 1), (3, 1023, 1), (4, 1990, 1), (5, 64, 1)]
ATTENDED += [(6, 0, 512), (7, 512, 300), (8, 1024, 70), (9, 0, 2)]


def check_pieces(pieces: Pieces, run: Callable[[Pieces, slice], Sequence[Tensor]], what: str) -> None:
    """All sequences at once, each alone, and those of one row apart from the others."""
    ends = torch.tensor([count for _, _, count in pieces]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    every = run(pieces, slice(0, ends[-1]))
    decodes = sum(count == 1 for _, _, count in pieces)
    groups = [[index] for index in range(len(pieces))]
    groups += [list(range(decodes)), list(range(1, decodes)), list(range(decodes, len(pieces)))]
    for group in groups:
        here = slice(starts[group[0]], ends[group[-1]])
        for index, (part, whole) in enumerate(zip(run([pieces[i] for i in group], here), every, strict=True)):
            require_equal(part, whole[here], f"{what}, output {index}, sequences {group}")


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_attention(shape: Shape, fp8: bool) -> None:
    heads, groups, dim, page, window = shape
    kv = pages((page, groups, dim), 10, 2048, torch.bfloat16, "cuda", fp8)._replace(batch_invariant=True)
    both = torch.randn(sum(count for _, _, count in ATTENDED), heads, 2 * dim, device="cuda").bfloat16()

    def run(some: Pieces, here: slice) -> list[Tensor]:
        q, gate = both[here].split(dim, dim=-1)
        return [paged_attention(q, kv, Rows.of(some, "cuda"), dim**-0.5, window=window, gate_TND=gate)]

    check_pieces(ATTENDED, run, f"attention {shape}")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [delta_cases.SMALL, delta_cases.QWEN], ids=str)
def test_delta_nets(heads: Any) -> None:
    pieces = [*delta_cases.DECODES[:3], (4, 0, 512), (5, 512, 300), (6, 1024, 64), (7, 64, 2)]
    case = delta_cases.layer(heads, pieces, torch.bfloat16, "cuda")

    def run(some: Pieces, here: slice) -> list[Tensor]:
        state, inputs = delta_cases.copy(case.state), DeltaInputs(*(part[here] for part in case.inputs))
        out = delta_net(*inputs, case.weights, state, Rows.of(some, "cuda"), delta_cases.EPS)
        # What each row's sequence is left with, beside its output.
        kept = {slot: state.memory(slot, before + count)[:, ::7].flatten() for slot, before, count in some}
        slots = [slot for slot, _, count in some for _ in range(count)]
        return [out, torch.stack([kept[slot] for slot in slots]), state.conv.flatten(1)[slots]]

    check_pieces(pieces, run, f"delta net {heads}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [5003, 8192])
def test_sampling(vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.randn(ROWS, vocabulary, device="cuda").to(dtype)
    rows = SamplingRows(
        temperature=torch.rand(ROWS, device="cuda") * 2,
        top_k=torch.randint(0, 50, (ROWS,), device="cuda", dtype=torch.int32),
        top_p=torch.rand(ROWS, device="cuda") / 2 + 0.5,
        min_p=torch.rand(ROWS, device="cuda") / 10,
        uniform=torch.rand(ROWS, device="cuda"),
    )

    def run(here: slice) -> list[Tensor]:
        sampled = sample(logits[here].clone(), SamplingRows(*(part[here].clone() for part in rows)))
        found = logprobs(logits[here].clone(), sampled.token_ids, 5, batch_invariant=True)
        return [*sampled, *found]

    check_parts(run, f"{vocabulary} tokens, {dtype}")
