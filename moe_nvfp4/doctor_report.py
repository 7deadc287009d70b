"""What the doctor found: data that goes to JSON as it is, and tables for a terminal of 100 columns."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

WIDTH = 100
SHOWN = 12  # problems and names of one kind in the text; the JSON has all
COMMON_GPUS_GB = (24, 48, 80, 141)
USABLE = 0.9  # of a GPU's nominal memory; the rest is for workspace, driver and libraries


@dataclass(frozen=True, slots=True)
class Declared:
    """What one config file says; None where it says nothing."""

    file: str
    algorithm: str | None
    kv_cache: str | None
    producer: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """Modules of one kind that are stored in one way, or tensors that are ignored."""

    kind: str
    algorithm: str
    count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Experts:
    layers: int
    per_layer: int
    top_k: int | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Conventions:
    dialect: str
    global_scale: str
    nvfp4_weights: int
    input_scales: int
    kv_scales: int


@dataclass(frozen=True, slots=True)
class ScaleRatios:
    """Groups of weights whose global scales some engines merge into one. A ratio is largest / smallest."""

    kind: str
    groups: int
    differing: int
    median: float | None  # of the groups that differ
    largest: float | None
    largest_at: str | None


@dataclass(frozen=True, slots=True)
class GlobalScales:
    """Global scales in their multiplier form, or the scales of FP8 weights; extremes are of the usable ones."""

    kind: str
    algorithm: str
    count: int
    zero: int
    negative: int
    nan: int
    infinite: int  # as stored, or as the reciprocal of a divisor
    smallest: float | None
    median: float | None
    largest: float | None


@dataclass(frozen=True, slots=True)
class BlockScales:
    kind: str
    weights: int
    scales: int
    zero: int
    subnormal: int
    negative: int
    nan: int
    affected_weights: int
    worst: str | None


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Bytes on the fullest GPU; the cache is that of `Memory.sequences` sequences of `Memory.tokens`."""

    gpus: int
    experts: int
    dense: int
    cache: int
    total: int
    smallest_gpu_gb: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    kv_bytes_per_1000_tokens: int
    bytes_per_sequence: int  # recurrent states, and the KV of full sliding windows
    sequences: int
    tokens: int
    rows: tuple[MemoryRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    path: str
    architecture: str
    model_type: str
    tensors: int
    nbytes: int
    declared: tuple[Declared, ...]
    parts: tuple[Part, ...]
    ignored: tuple[Part, ...]
    experts: Experts
    conventions: Conventions
    ratios: tuple[ScaleRatios, ...]
    global_scales: tuple[GlobalScales, ...]
    block_scales: tuple[BlockScales, ...]
    dead_experts: tuple[str, ...]
    uncalibrated_experts: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unindexed: tuple[str, ...]
    memory: Memory
    runs: bool
    runs_note: str
    reasons: tuple[str, ...]  # why it is broken
    remarks: tuple[str, ...]

    @property
    def broken(self) -> bool:
        return bool(self.reasons)

    @property
    def verdict(self) -> str:
        if self.broken:
            return "broken"
        return "sound, with remarks" if self.remarks else "sound"

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = _plain(self)
        return {"verdict": self.verdict, "broken": self.broken} | content


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def render(report: Report) -> str:
    """Plain text, at most 100 columns wide."""
    lines = [
        report.path,
        f"  {report.architecture} ({report.model_type}), {report.conventions.dialect}",
        f"  {report.tensors:,} tensors, {size(report.nbytes)}",
        *_declared(report),
        *_parts(report),
        *_conventions(report),
        *_scales(report),
        *_listed("dead experts", report.dead_experts),
        *_listed("uncalibrated experts", report.uncalibrated_experts),
        *_listed("missing weights", report.missing),
        *_listed("tensors that nothing uses", report.unexpected),
        *_listed("tensors in a shard, but not in the index", report.unindexed),
        *_memory(report.memory),
        *_verdict(report),
    ]
    # Names come from an untrusted file: no control character may reach the terminal.
    cleaned = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in cleaned)


def _declared(report: Report) -> Iterator[str]:
    rows = [(d.file, *(item or "-" for item in (d.algorithm, d.kv_cache, d.producer))) for d in report.declared]
    yield ""
    if not rows:
        yield "Declared: nothing; neither config.json nor hf_quant_config.json speaks of quantisation"
        return
    yield from table(("declared in", "algorithm", "KV cache", "producer"), rows, left=4)


def _parts(report: Report) -> Iterator[str]:
    experts = report.experts
    yield ""
    rows = [(part.kind, part.algorithm, f"{part.count:,}", size(part.nbytes)) for part in report.parts]
    rows += [(part.kind, part.algorithm, f"{part.count:,}", size(part.nbytes)) for part in report.ignored]
    yield from table(("kind", "algorithm", "modules", "size"), rows, left=2)
    yield ""
    if not experts.layers:
        yield "Experts: none, a dense model"
        return
    top_k = f", top-{experts.top_k}" if experts.top_k else ""
    yield f"Experts: {experts.layers} layers of {experts.per_layer:,}{top_k}; {size(experts.nbytes)}"


def _conventions(report: Report) -> Iterator[str]:
    found = report.conventions
    yield f"Global scales: {found.global_scale}"
    yield f"Input scales: on {found.input_scales:,} of {found.nvfp4_weights:,} NVFP4 weights; weight-only: not used"
    yield f"KV-cache scales: {found.kv_scales:,}" + ("" if found.kv_scales else "; 1.0 is meant where FP8 is declared")


def _scales(report: Report) -> Iterator[str]:
    if report.global_scales:
        yield ""
        header = ("global scales", "algorithm", "count", "smallest", "median", "largest", "zero", "bad")
        yield from table(header, [_global_row(row) for row in report.global_scales], left=2)
    if report.block_scales:
        yield ""
        columns = ("block scales", "weights", "affected", "scales", "zero", "subnormal", "negative", "NaN")
        yield from table(columns, [_block_row(row) for row in report.block_scales])
        for row in report.block_scales:
            if row.worst:
                yield f"  worst of {row.kind}: {row.worst}"
    if report.ratios:
        yield ""
        yield from _ratios(report.ratios)


def _ratios(ratios: Sequence[ScaleRatios]) -> Iterator[str]:
    rows = [(r.kind, f"{r.groups:,}", f"{r.differing:,}", _ratio(r.median), _ratio(r.largest)) for r in ratios]
    yield from table(("scales that engines merge", "groups", "differ", "median ratio", "largest ratio"), rows)
    for ratio in ratios:
        if ratio.largest_at:
            yield f"  largest of {ratio.kind}: {ratio.largest_at}"
    if largest := max((ratio.largest for ratio in ratios if ratio.largest), default=None):
        yield "  This package keeps each scale. An engine that merges them is wrong on this file,"
        yield f"  by a factor of up to {largest:,.4g}."
    else:
        yield "  They are equal here, so merging them loses nothing. This package keeps each."


def _block_row(row: BlockScales) -> tuple[str, ...]:
    counts = (row.weights, row.affected_weights, row.scales, row.zero, row.subnormal, row.negative, row.nan)
    return row.kind, *(f"{count:,}" for count in counts)


def _global_row(row: GlobalScales) -> tuple[str, ...]:
    values = ("-" if value is None else f"{value:.3e}" for value in (row.smallest, row.median, row.largest))
    bad = row.negative + row.nan + row.infinite
    return row.kind, row.algorithm, f"{row.count:,}", *values, f"{row.zero:,}", f"{bad:,}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}x"


def _listed(title: str, names: Sequence[str]) -> Iterator[str]:
    if not names:
        return
    yield ""
    yield f"{len(names):,} {title}"
    yield from (f"  {name}" for name in names[:SHOWN])
    if len(names) > SHOWN:
        yield f"  and {len(names) - SHOWN:,} more, in the JSON"


def _memory(memory: Memory) -> Iterator[str]:
    yield ""
    header = ("GPUs", "experts", "dense", "weights per GPU", "with cache", "fits on")
    rows = [
        (
            str(row.gpus),
            *(size(n) for n in (row.experts, row.dense, row.experts + row.dense, row.total)),
            f"{row.smallest_gpu_gb} GB" if row.smallest_gpu_gb else f"over {COMMON_GPUS_GB[-1]} GB",
        )
        for row in memory.rows
    ]
    yield from table(header, rows)
    yield f"  cache: {memory.sequences} sequences of {memory.tokens:,} tokens in BF16, on every GPU;"
    yield (
        f"  {size(memory.kv_bytes_per_1000_tokens)} per 1,000 tokens, and {size(memory.bytes_per_sequence)} per "
        "sequence for states and windows"
    )
    yield f"  {1 - USABLE:.0%} of each GPU is left for workspace, driver and libraries"


def _verdict(report: Report) -> Iterator[str]:
    yield ""
    yield f"Verdict: {report.verdict}"
    yield from _bullets(report.reasons)
    if report.reasons and report.remarks:
        yield "Remarks:"
    yield from _bullets(report.remarks)
    yield from textwrap.wrap(report.runs_note, WIDTH)


def _bullets(items: Sequence[str]) -> Iterator[str]:
    for item in items[:SHOWN]:
        text = " ".join(item[:800].split())
        yield from textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    if len(items) > SHOWN:
        yield f"  - and {len(items) - SHOWN:,} more, in the JSON"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns, the first `left` of them to the left."""
    rows = [header, *(tuple(cell[:48] for cell in row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * min(WIDTH, sum(widths) + 2 * len(widths) - 2), *lines[1:]]


def size(nbytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes} B"
