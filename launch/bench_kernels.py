"""`moe-nvfp4 bench kernels`: each kernel against its float64 twin first, then its time and share of the ceilings.

A case's calls rotate over weights and routings, so that what one has read is no longer in L2 when another needs it.
Bytes are the weights of the experts that have rows, and the rows read and written. A case whose error is too large
gets no time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from moe_nvfp4.errors import RequestError
from moe_nvfp4.kernels.activation import activate
from moe_nvfp4.kernels.dense import dense_linear
from moe_nvfp4.kernels.dense_rows import DenseWeight
from moe_nvfp4.kernels.few_rows import routed_experts_pairs
from moe_nvfp4.kernels.fragments import ROWS, FragmentTensor, from_fragments
from moe_nvfp4.kernels.grouped_rows import routed_experts_grouped, run_for
from moe_nvfp4.kernels.many_rows import routed_experts_many
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, relative_error
from moe_nvfp4.kernels.route import route
from moe_nvfp4.kernels.routed_experts import routed_experts
from moe_nvfp4.kernels.sort_pairs import SortedPairs, sort_pairs, sort_pairs_twin
from moe_nvfp4.launch.bench_data import (
    SHAPES,
    Experts,
    Popularity,
    Routing,
    Shape,
    random_dense,
    random_experts,
    random_routing,
    routed_shape,
)
from moe_nvfp4.launch.bench_peers import peer_layer
from moe_nvfp4.launch.bench_timing import Ceilings, Timing, graph_time, measure_ceilings

TOLERANCE: Final = 1e-2  # |error| / |reference|; activations between the projections are bfloat16
CHECKED_ROWS: Final = 32  # of a case with more, so many random ones are compared
CHECKED_OUTPUTS: Final = 2048  # of a dense weight with more than twice so many, the first and the last
L2_MULTIPLE: Final = 3
GRAPH_CALLS: Final = 32  # at least, for up to LONG_ROWS rows: the launch of a graph costs some microseconds too
LONG_ROWS: Final = 256
# Fewest and most rows for which a kernel is timed; each is made for a part of them. The last one chooses among them,
# and sorts.
ROWS_OF: Final = {
    "experts, pairs": (1, 16),
    "experts, grouped": (2, 512),
    "experts, many": (64, 1 << 30),
    "experts": (1, 1 << 30),
}

Runner = Callable[[Experts, Tensor, Routing, SortedPairs, str], Tensor]
RUNNERS: Final[dict[str, Runner]] = {
    "experts, pairs": lambda w, x, r, p, act: routed_experts_pairs(x, *w, *r, activation=act),
    "experts, grouped": lambda w, x, r, p, act: routed_experts_grouped(x, *w, *r, p, activation=act),
    "experts, many": lambda w, x, r, p, act: routed_experts_many(x, *w, *r, p.order, p.offsets, activation=act),
    "experts": lambda w, x, r, p, act: routed_experts(x, *w, *r, activation=act),
}


@dataclass(frozen=True, slots=True)
class Result:
    shape: str
    kernel: str
    tokens: int
    error: float
    timing: Timing | None  # None: the error is too large
    bytes: float
    flops: float
    peer: float | str | None = None  # microseconds, or why there are none

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes and floating-point operations a second."""
        seconds = math.inf if self.timing is None else self.timing.median * 1e-6
        return self.bytes / seconds, self.flops / seconds

    def share(self, ceilings: Ceilings) -> float:
        moved, done = self.rates
        return max(moved / ceilings.bytes_per_second, done / ceilings.flops_per_second)

    def line(self, ceilings: Ceilings) -> str:
        head = f"{self.shape:<16}{self.kernel:<24}{self.tokens:>5}  error {self.error:.1e}"
        if self.timing is None:
            return f"{head}  RED, not timed"
        moved, done = self.rates
        peer = f"{self.peer / self.timing.median:.2f} x" if isinstance(self.peer, float) else self.peer or ""
        return (
            f"{head}{self.timing.median:>9.2f} us ({self.timing.low:.2f} to {self.timing.high:.2f})"
            f"{moved / 1e9:>7.0f} GB/s{done / 1e12:>7.1f} TFLOP/s{self.share(ceilings):>6.0%}  {peer}"
        ).rstrip()

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        return {**asdict(self), "share": None if self.timing is None else self.share(ceilings)}


def bench_kernels(
    shapes: Sequence[str],
    tokens: Sequence[int],
    popularity: Popularity,
    compare: str | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Reports a line a case, and returns all figures."""
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise RequestError(f"--shapes: got {', '.join(unknown)}; expected some of {', '.join(SHAPES)}")
    if not tokens or min(tokens) < 1:
        raise RequestError(f"--tokens: got {list(tokens)}; expected numbers from 1")
    if not torch.cuda.is_available():
        raise RequestError("bench kernels: no CUDA GPU is visible; run it on a machine that has one")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    report(str(ceilings))
    results = []
    for name in shapes:
        for cases in (routing_cases, expert_cases, dense_cases):
            for result in cases(name, tokens, popularity, compare, ceilings.l2_bytes):
                report(result.line(ceilings))
                results.append(result.to_json(ceilings))
            torch.cuda.empty_cache()
    return {"ceilings": asdict(ceilings), "torch": torch.__version__, "routing": popularity, "results": results}


def routing_cases(
    name: str, tokens: Sequence[int], popularity: Popularity, compare: str | None, l2_bytes: int
) -> Iterator[Result]:
    shape, routed = SHAPES[name], routed_shape(SHAPES[name], popularity)
    size = 2 * shape.experts * shape.hidden
    routers = [
        torch.randn(shape.experts, shape.hidden, dtype=torch.bfloat16, device="cuda") / shape.hidden**0.5
        for _ in range(_sets(size, l2_bytes))
    ]
    for rows in tokens:
        x = _rows(rows, shape)
        bytes_ = size + x.nbytes + 8 * rows * shape.top
        calls = [partial(route, x, router, shape.top, normalise=True) for router in routers]
        yield _timed(name, "route", rows, _route_error(x, routers[0], shape), calls, bytes_, 1.0 * size * rows)
        ids = [random_routing(rows, routed, popularity).expert_ids_TK for _ in range(8)]
        run = _run(rows, routed)
        found, wanted = sort_pairs(ids[0], routed.experts, run), sort_pairs_twin(ids[0], routed.experts, run)
        exact = all(map(torch.equal, found[:3], wanted[:3]))
        sorts = [partial(sort_pairs, i, routed.experts, run) for i in ids]
        yield _timed(name, "sort", rows, 0.0 if exact else math.inf, sorts, 8 * rows * shape.top, 0.0)


def expert_cases(
    name: str, tokens: Sequence[int], popularity: Popularity, compare: str | None, l2_bytes: int
) -> Iterator[Result]:
    shape = routed_shape(SHAPES[name], popularity)
    sets = [random_experts(shape)]
    sets += [random_experts(shape) for _ in range(_sets(sets[0].nbytes, l2_bytes) - 1)]
    peer = peer_layer(compare, shape, len(sets))
    for rows in tokens:
        x = _rows(rows, shape)
        routings = [random_routing(rows, shape, popularity) for _ in range(32 if rows <= 64 else 8)]
        run_length = _run(rows, shape)
        pairs = [sort_pairs(r.expert_ids_TK, shape.experts, run_length) for r in routings]
        distinct = sum(len(r.expert_ids_TK.unique()) for r in routings) / len(routings)
        bytes_ = distinct * sets[0].nbytes / shape.experts + 2 * x.nbytes
        flops = 2.0 * rows * shape.top * shape.projections * shape.hidden * shape.inner
        checked = torch.randperm(rows, device="cuda")[:CHECKED_ROWS]
        expected = _experts_reference(shape, sets[0], x[checked], Routing(*(part[checked] for part in routings[0])))
        theirs = peer.time(x, routings).median if peer is not None and not isinstance(peer, str) else peer
        for kernel, run in RUNNERS.items():
            if ROWS_OF[kernel][0] <= rows <= ROWS_OF[kernel][1]:
                error = relative_error(run(sets[0], x, routings[0], pairs[0], shape.activation)[checked], expected)
                calls = [
                    partial(run, sets[i % len(sets)], x, routings[i], pairs[i], shape.activation)
                    for i in range(len(routings))
                ]
                yield _timed(name, kernel, rows, error, calls, bytes_, flops, theirs)


def dense_cases(
    name: str, tokens: Sequence[int], popularity: Popularity, compare: str | None, l2_bytes: int
) -> Iterator[Result]:
    for layer, (kind, outputs, columns) in SHAPES[name].dense.items():
        weights = [random_dense(kind, outputs, columns)]
        weights += [random_dense(kind, outputs, columns) for _ in range(_sets(weights[0].nbytes, l2_bytes) - 1)]
        for rows in tokens:
            x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
            bytes_ = weights[0].nbytes + x.nbytes + 2 * rows * outputs
            calls = [partial(dense_linear, x, weight, dependent=True) for weight in weights]  # as models do
            error = _dense_error(x, weights[0])
            yield _timed(name, f"{layer}, {kind}", rows, error, calls, bytes_, 2.0 * rows * outputs * columns)


def _timed(
    name: str, kernel: str, rows: int, error: float, calls: Sequence[Callable[[], object]], bytes_: float,
    flops: float, peer: float | str | None = None,
) -> Result:  # fmt: skip
    repeats = math.ceil(GRAPH_CALLS / len(calls)) if rows <= LONG_ROWS else 1
    timing = graph_time([*calls] * repeats) if error <= TOLERANCE else None
    return Result(name, kernel, rows, error, timing, bytes_, flops, peer)


def _sets(nbytes: int, l2_bytes: int) -> int:
    free = torch.cuda.mem_get_info()[0]
    return max(1, min(2 + L2_MULTIPLE * l2_bytes // nbytes, free // 3 // nbytes))


def _run(rows: int, shape: Shape) -> int:
    pairs, most = rows * shape.top, ROWS_OF["experts, grouped"][1]
    return run_for(pairs, shape.experts) if rows <= most else pairs


def _rows(rows: int, shape: Shape) -> Tensor:
    return torch.randn(rows, shape.hidden, dtype=torch.bfloat16, device="cuda")


def _route_error(x: Tensor, router: Tensor, shape: Shape) -> float:
    """Of the chosen scores against the best ones, and of the weights: near ties may be chosen either way."""
    routes = route(x, router, shape.top, normalise=True)
    scores = (x.double() @ router.double().T).softmax(dim=-1)
    chosen = scores.gather(1, routes.expert_ids_TK.long())
    weights = chosen / chosen.sum(dim=-1, keepdim=True)
    return max(relative_error(chosen, scores.topk(shape.top).values), relative_error(routes.weights_TK, weights))


def _experts_reference(shape: Shape, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for expert in routing.expert_ids_TK.unique().tolist():
        rows, choice = (routing.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate, up, down = (None if w is None else _double(FragmentTensor(*(p[expert] for p in w))) for w in experts)
        assert up is not None and down is not None
        inner = activate(shape.activation, None if gate is None else x[rows].double() @ gate.T, x[rows].double() @ up.T)
        y.index_add_(0, rows, inner @ down.T * routing.weights_TK[rows, choice, None].double())
    return y


def _dense_error(x: Tensor, weight: DenseWeight) -> float:
    rows = torch.randperm(x.shape[0], device="cuda")[:CHECKED_ROWS]
    outputs = weight.shape[0]
    parts = [slice(0, outputs)] if outputs <= 2 * CHECKED_OUTPUTS else [slice(0, CHECKED_OUTPUTS)]
    parts += [] if outputs <= 2 * CHECKED_OUTPUTS else [slice(outputs - CHECKED_OUTPUTS, outputs)]
    y = dense_linear(x, weight)[rows]
    return max(relative_error(y[:, p], x[rows].double() @ _double(_outputs(weight, p)).T) for p in parts)


def _outputs(weight: DenseWeight, part: slice) -> DenseWeight:
    if isinstance(weight, Tensor):
        return weight[part]
    if isinstance(weight, FP8Tensor):
        return FP8Tensor(weight.values[part], weight.scale[part])
    strips = slice(part.start // ROWS, part.stop // ROWS)
    return FragmentTensor(weight.words[strips], weight.scales[strips], weight.global_scale)


def _double(weight: DenseWeight) -> Tensor:
    if isinstance(weight, FragmentTensor):
        return from_fragments(weight).dequantize().double()
    return weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()
