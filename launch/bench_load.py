"""`moe-nvfp4 bench load`: how long a checkpoint takes to load, against a plain sequential read of its files."""

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.preparation import Preparation
from moe_nvfp4.settings import RunnerSettings

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Seconds are medians over `runs`; `spread` holds the fastest and the slowest. Bytes are of the device."""

    model: str
    device: str
    runs: int
    file_bytes: int
    read_seconds: float
    read_spread: tuple[float, float]
    open_seconds: float  # headers, accounting, tokenizer, plan
    load_seconds: float  # open included
    load_spread: tuple[float, float]
    final_bytes: int
    planned_bytes: int  # expert buffers and dense weights
    peak_bytes: int | None  # of the allocator, on a GPU

    @property
    def ratio(self) -> float:
        return self.load_seconds / self.read_seconds

    def table(self) -> str:
        gigabytes = self.file_bytes / 1e9
        rows = [
            ("plain sequential read", self.read_seconds, self.read_spread, f"{gigabytes / self.read_seconds:.1f} GB/s"),
            ("load", self.load_seconds, self.load_spread, f"{gigabytes / self.load_seconds:.1f} GB/s"),
        ]
        lines = [f"{self.model}: {gigabytes:.2f} GB in files, {self.device}, median of {self.runs}"]
        lines += [f"  {n:<22}{s:7.2f} s  ({a:.2f} to {b:.2f})  {note}" for n, s, (a, b), note in rows]
        lines.append(f"  {'of it, open and check':<22}{self.open_seconds:7.2f} s")
        lines.append(f"  {'load / read':<22}{self.ratio:7.2f}")
        lines.append(f"  {'final size':<22}{self.final_bytes / 1e9:7.3f} GB  (planned {self.planned_bytes / 1e9:.3f})")
        if self.peak_bytes is not None:
            over = 100 * (self.peak_bytes / self.final_bytes - 1)
            lines.append(f"  {'peak':<22}{self.peak_bytes / 1e9:7.3f} GB  ({over:+.2f} % of the final size)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio}


def bench_load(model: str, device: str | None, dtype: str | None, runs: int) -> LoadReport:
    with Checkpoint.open(model) as checkpoint:
        paths = [file.path for file in checkpoint.files]
        name = checkpoint.folder.name
    _sequential_read(paths)  # the page cache is part of the measurement: both sides find the files in it
    reads = [_sequential_read(paths) for _ in range(runs)]
    opens, loads, finals, peak = [], [], [], None
    for _ in range(runs):
        _empty_device()
        started = time.perf_counter()
        prepared = Preparation(model, RunnerSettings(device=device, dtype=dtype, max_batch_size=1, verbose=False))
        opens.append(time.perf_counter() - started)
        on_gpu = prepared.device.type == "cuda"
        before = torch.cuda.memory_allocated(prepared.device) if on_gpu else 0
        built = prepared.load_model()
        if on_gpu:
            torch.cuda.synchronize(prepared.device)
        loads.append(time.perf_counter() - started)
        planned = prepared.plan.experts + prepared.plan.dense
        finals.append(torch.cuda.memory_allocated(prepared.device) - before if on_gpu else planned)
        if on_gpu:
            peak = max(peak or 0, torch.cuda.max_memory_allocated(prepared.device) - before)
        del built
    where = torch.cuda.get_device_name(prepared.device) if on_gpu else "CPU"
    return LoadReport(
        model=name,
        device=where,
        runs=runs,
        file_bytes=sum(path.stat().st_size for path in paths),
        read_seconds=statistics.median(reads),
        read_spread=(min(reads), max(reads)),
        open_seconds=statistics.median(opens),
        load_seconds=statistics.median(loads),
        load_spread=(min(loads), max(loads)),
        final_bytes=finals[-1],
        planned_bytes=planned,
        peak_bytes=peak,
    )


def _sequential_read(paths: list[Path]) -> float:
    buffer = bytearray(BLOCK_BYTES)
    started = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _empty_device() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.init()  # the driver's start-up is not part of a load
        torch.zeros(1, device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
