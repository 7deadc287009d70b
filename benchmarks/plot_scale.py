"""What 8 to 1024 GPUs would give: the model of docs/scale.md. Draws its plots and writes its tables.

python benchmarks/plot_scale.py docs

Constants come from measurements on one H200 (benchmarks/results) and on 2 and 4 H200s, or from published figures of
others; docs/scale.md names them. Nothing here was measured on more than 4 GPUs.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from drawing import bars, ceiling, lines, page

from moe_nvfp4.launch.bench_balance import Model, windows
from moe_nvfp4.layouts.base import CacheGeometry
from moe_nvfp4.published import ITEM_BYTES, published
from moe_nvfp4.routing.placement import Placement, Slots
from moe_nvfp4.routing.rebalance import rank_loads, rebalance

RESULTS = Path(__file__).parent / "results"
NODE = 8
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (8, 32, 128)  # sequences on each GPU
CONTEXT = 2048
SPARE = 2  # slots of a rank beyond an even share
SKEW = "zipf 0.8"

READ = 4.39e12  # bytes a second, measured beside the kernels below
# Fitted to benchmarks/results/kernels-h200.json. Few experts with many rows do not fill a GPU: FEW_EXPERTS.
EXPERT_READ, EXPERT_FLOPS, EXPERT_START, FEW_EXPERTS = 0.8 * READ, 450e12, 5e-6, 28e-6
NVLINK, NVLINK_START = 230e9, 11e-6  # all-to-all of 4 H200s through NCCL: 8192 rows of 4 KB in 110 us, 128 in 13 us
NETWORK, NETWORK_START = 40e9, 25e-6  # of 50 GB/s; what DeepEP publishes at 64 to 256 GPUs is met within 15 %
MEMORY = 0.9 * 139 * 2**30


@dataclass(frozen=True)
class Sizes:
    name: str
    shape: Model
    hidden: int
    expert: float  # bytes of one expert in one layer
    weights: float  # bytes of one expert in elements
    dense: float  # bytes that every GPU reads at each step: all but experts and embedding
    embedding: float
    cache: CacheGeometry

    def sequence_traffic(self) -> float:
        """Bytes that one more sequence makes a step read and write: keys, values, and states twice."""
        return self.cache.bytes(CONTEXT, 2) + self.cache.state_bytes

    def slots(self, gpus: int) -> int:
        return min(self.shape.experts, -(-self.shape.experts // gpus) + SPARE)

    def resident(self, gpus: int) -> float:
        return self.dense + self.embedding + self.shape.layers * self.slots(gpus) * self.expert

    def most_sequences(self, gpus: int) -> int:
        return max(0, int((MEMORY - self.resident(gpus)) / self.cache.bytes(CONTEXT, 2)))


def sizes(label: str, repository: str) -> Sizes:
    known = published(repository)
    ignored = {name.removesuffix(".weight") for name in {**known.layout.ignored, **known.layout.mtp}}
    total = {"experts": 0.0, "embedding": 0.0, "dense": 0.0}
    for tensor in known.stored():
        if tensor.name in ignored or tensor.name.rpartition(".")[0] in ignored:
            continue
        kind = "experts" if ".experts." in tensor.name else "embedding" if "embed_tokens" in tensor.name else "dense"
        total[kind] += ITEM_BYTES[tensor.spec.dtype] * prod(tensor.spec.shape)
    block, text = known.layout.experts[0], known.config.get("text_config", known.config)
    shape = Model(len(known.layout.experts), block.count, text["num_experts_per_tok"])
    weights = sum(rows * columns for rows, columns in block.projections.values())
    expert = total["experts"] / shape.layers / shape.experts
    dense, embedding = total["dense"], total["embedding"]
    return Sizes(label, shape, text["hidden_size"], expert, weights, dense, embedding, known.layout.cache)


def expert_seconds(nbytes: float, flops: float, rows: float) -> float:
    """`rows` of each expert that has any."""
    seconds = EXPERT_START + nbytes / EXPERT_READ + flops / EXPERT_FLOPS
    return seconds if rows < 8 else max(seconds, FEW_EXPERTS + flops / EXPERT_FLOPS)


@cache
def fit_rest() -> tuple[float, float, float]:
    """Measured steps of Qwen3.6 less its experts: seconds a layer, bytes a second, and the worst deviation."""
    steps = json.loads((RESULTS / "decode-qwen3.6-35b-h200.json").read_text())["decode"]
    layer_us = {r["tokens"]: r["timing"][0] for r in _expert_runs("shared", "qwen3.6")}
    points = []
    for step in steps:
        if step["batch"] in layer_us:
            rest = step["milliseconds"] / 1e3 - 40 * layer_us[step["batch"]] / 1e6
            points.append((step["bytes"] - step["bytes_by_kind"]["experts"], rest))
    nbytes, seconds = np.array(points).T
    slope, start = np.polyfit(nbytes, seconds, 1, w=1 / seconds)
    worst = float(np.abs((start + slope * nbytes) / seconds - 1).max())
    return float(start) / 40, 1 / float(slope), worst


def expert_deviation(routing: str) -> float:
    """Rows of one expert: all tokens take the same eight, or they spread over all."""
    worst = 0.0
    for shape, experts in (("qwen3.6", 256), ("gemma-4", 128)):
        for run in _expert_runs(routing, shape):
            touched = 8 if routing == "one" else experts * (1 - (1 - 8 / experts) ** run["tokens"])
            seconds = expert_seconds(run["bytes"], run["flops"], run["tokens"] * 8 / touched)
            worst = max(worst, abs(1e6 * seconds / run["timing"][0] - 1))
    return worst


def _expert_runs(routing: str, shape: str) -> list[dict[str, Any]]:
    runs = json.loads((RESULTS / "kernels-h200.json").read_text())["runs"]
    results = next(run["results"] for run in runs if run["routing"] == routing)
    return [r for r in results if r["shape"] == shape and r["kernel"] == "experts"]


@cache
def placements(shape: Model, gpus: int, spare: int) -> tuple[Slots, Slots]:
    """Without regard to loads, and balanced for a window of counted ones."""
    (loads,) = next(windows(SKEW, shape._replace(layers=1)))
    slots = -(-shape.experts // gpus)
    if gpus <= shape.experts:
        even = Placement.even([0], shape.experts, gpus)
    else:
        even = Placement(shape.experts, {0: tuple((rank % shape.experts,) for rank in range(gpus))})
    return even.slots[0], rebalance({0: loads}, even, slots_per_rank=[slots + spare] * gpus).slots[0]


@cache
def balance(shape: Model, gpus: int, batch: int | None, spare: int | None) -> float:
    """Mean over largest load of a step, whose rows are drawn: few of them are uneven on the best placement.

    `batch` None: as if every step had the counted loads. `spare` None: placed without regard to loads.
    """
    even, balanced = placements(shape, gpus, spare or 0)
    slots = even if spare is None else balanced
    (loads,) = next(windows(SKEW, shape._replace(layers=1)))
    random = np.random.default_rng(1)
    rows = None if batch is None else batch * gpus * shape.top
    drawn = [loads if rows is None else random.multinomial(rows, loads / loads.sum()) for _ in range(8)]
    return float(np.mean([one.sum() / gpus / max(rank_loads(one, slots)) for one in drawn]))


def exchange_bytes(model: Sizes, gpus: int, batch: int) -> tuple[float, float]:
    """That a GPU sends to its node and beyond in one direction: a row goes once to each GPU that has experts of it."""
    targets = gpus * (1 - (1 - 1 / gpus) ** model.shape.top)
    row = 2 * model.hidden * batch * targets / gpus
    return row * (min(gpus, NODE) - 1), row * max(0, gpus - NODE)


def exchange_seconds(model: Sizes, gpus: int, batch: int, even: float) -> float:
    near, far = exchange_bytes(model, gpus, batch)
    start = NETWORK_START if far else NVLINK_START
    return start + max(near / NVLINK, far / NETWORK) / even


def all_reduce_bytes(model: Sizes, gpus: int, batch: int) -> float:
    return 2 * (gpus - 1) / gpus * batch * gpus * 2 * model.hidden


def step(model: Sizes, gpus: int, batch: int, even: float | None = None) -> dict[str, float]:
    """Seconds of a decode step by part."""
    layer_start, rest_read, _ = fit_rest()
    shape = model.shape
    even = balance(shape, gpus, batch, SPARE) if even is None else even
    slots = model.slots(gpus)
    touched = slots * (1 - math.exp(-batch * shape.top / slots))
    flops, rows = 2 * model.weights * batch * shape.top, batch * shape.top / touched
    ideal = expert_seconds(touched * model.expert, flops, rows)
    return {
        "dense": layer_start * shape.layers + model.dense / rest_read,
        "cache": batch * model.sequence_traffic() / rest_read,
        "experts": shape.layers * ideal,
        "uneven": shape.layers * (expert_seconds(touched * model.expert, flops / even, rows) - ideal),
        "exchange": shape.layers * 2 * exchange_seconds(model, gpus, batch, even),
    }


def throughput(model: Sizes, gpus: int, batch: int) -> float:
    """Tokens a second of each GPU."""
    return batch / sum(step(model, gpus, batch).values())


def plots(models: Sequence[Sizes]) -> dict[str, str]:
    rates, times = [], []
    for index, model in enumerate(models):
        curves = {f"{b} sequences a GPU": [(g, throughput(model, g, b)) for g in GPUS] for b in BATCHES}
        top = ceiling(max(rate for curve in curves.values() for _, rate in curve))
        rates.append(lines(index, f"{model.name}: tok/s of each GPU, modelled", top, "", curves))
        columns = {g: {name: 1e3 * s for name, s in step(model, g, 32).items()} for g in GPUS}
        top = ceiling(max(sum(parts.values()) for parts in columns.values()))
        times.append(bars(index, f"{model.name}: a step of 32 sequences a GPU", top, " ms", columns))
    even = []
    for index, model in enumerate(models):
        kinds: dict[str, tuple[int | None, int | None]] = {
            "in order": (None, None),
            f"rebalanced, {SPARE} spare slots": (None, SPARE),
            "the same, steps of 128": (128, SPARE),
            "the same, steps of 8": (8, SPARE),
        }
        curves = {name: [(g, 100 * balance(model.shape, g, *kind)) for g in GPUS] for name, kind in kinds.items()}
        even.append(lines(index, f"{model.name}: mean / largest load, {SKEW}", 100, " %", curves))
    return {"scale-throughput.svg": page(rates), "scale-step.svg": page(times), "scale-balance.svg": page(even)}


CHOSEN = (8, 64, 256, 1024)


def table(title: str, lines_of: Mapping[str, Sequence[str]]) -> str:
    head = [f"| {title} | " + " | ".join(f"{gpus} GPUs" for gpus in CHOSEN) + " |", "| --- " * (1 + len(CHOSEN)) + "|"]
    return "\n".join(head + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines_of.items()])


def tables(models: Sequence[Sizes]) -> list[str]:
    resident, moved, rates, uneven = ({} for _ in range(4))  # type: dict[str, list[str]]
    for model in models:
        resident[model.name] = [f"{model.resident(g) / 1e9:.1f} GB, {model.most_sequences(g)}" for g in CHOSEN]
        sent = [exchange_bytes(model, g, 32) for g in CHOSEN]
        moved[f"{model.name}, all-to-all"] = [f"{2 * near / 1e6:.1f} + {2 * far / 1e6:.1f}" for near, far in sent]
        moved[f"{model.name}, all-reduce"] = [f"{all_reduce_bytes(model, g, 32) / 1e6:.0f}" for g in CHOSEN]
        for batch in BATCHES:
            cells = rates.setdefault(f"{model.name}, {batch}", [])
            for g in CHOSEN:
                exchange, total = (parts := step(model, g, batch))["exchange"], sum(parts.values())
                hidden = batch / max(exchange, total - exchange)
                cells.append(f"{1e3 * total:.1f} ms, {exchange / total:.0%}, {batch / total:,.0f} ({hidden:,.0f})")
        kinds = {"in order": (None, None), "rebalanced": (None, SPARE), "rebalanced, steps of 8": (8, SPARE)}
        for name, kind in kinds.items():
            uneven[f"{model.name}, {name}"] = [f"{balance(model.shape, g, *kind):.2f}" for g in CHOSEN]
        slow = [sum(step(model, g, 32, balance(model.shape, g, 32, None)).values()) for g in CHOSEN]
        uneven[f"{model.name}, in order: ms a step of 32"] = [f"{1e3 * seconds:.1f}" for seconds in slow]
    return [
        table("weights of a GPU, sequences beside them", resident),
        table("MB sent by a GPU for a layer, 32 sequences", moved),
        table("sequences of a GPU: step, exchange, tok/s of a GPU", rates),
        table(f"balance, {SKEW}", uneven),
    ]


def main(folder: str) -> None:
    models = [
        sizes("Qwen3-235B-A22B", "nvidia/Qwen3-235B-A22B-NVFP4"),
        sizes("Qwen3.5-397B-A17B", "nvidia/Qwen3.5-397B-A17B-NVFP4"),
        sizes("Qwen3.6-35B-A3B", "nvidia/Qwen3.6-35B-A3B-NVFP4"),
    ]
    layer_start, read, worst = fit_rest()
    fits = (
        f"The rest of a step: {1e6 * layer_start:.1f} µs a layer and {read / 1e12:.2f} TB/s, off by {worst:.0%} at "
        f"most.\nExperts: off by {expert_deviation('uniform'):.0%} at most, and by {expert_deviation('one'):.0%} where "
        "all rows take the same eight."
    )
    document = Path(folder) / "scale.md"
    before, begin, rest = document.read_text(encoding="utf-8").partition("<!-- written by plot_scale.py -->")
    _, end, after = rest.partition("<!-- end -->")
    written = "\n\n".join(["", fits, *tables(models), ""])
    document.write_text(before + begin + written + end + after, encoding="utf-8")
    for name, content in plots(models).items():
        (Path(folder) / name).write_text(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
